"""Numbers of the documentation that `make gpu-check` measured: for `tools.doc_numbers`.

A list beside a text has a line for each number: what the text shows, the case as `gpu_check.md`
names it, the variant, and the quantity:

    93.1 us | steppo_loss, layout, forward + backward, turns 256x16384 | cuda | device
    1.36x | steppo_loss_from_logits, forward + backward, in place, 8192... | Liger : cuda | ratio
    2995 GB/s | rates | copy | rate

A case that ends in three dots is the first one that begins like that.

A table names the files that it is from in a comment above it. A case is looked for in the first of
them, then in the next:

    <!-- measured table: benchmarks/results/<GPU>/gpu_check.json -->

    | device time | cuda | cuda, wall | best peer |
    |---|---|---|---|
    | steppo_loss_from_logits, ... | 2.62 ms | 3.03 ms | 3.56 ms (Liger GRPO, Triton) |

The first cell of a row is the case. A cell holds numbers of the variant that heads its column, or
each is followed by its variant in parentheses; semicolons stand between them. The unit says which
quantity it is, and of times the heading does: `device` unless that ends in `wall` or `in kernels`.

    <!-- measured targets: benchmarks/results/<GPU>/gpu_check.json -->

A table of targets has a row for each one of the files. Its columns `wanted`, `measured` and
`verdict` are compared, and others are free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import Results, Row, beyond, in_kernels, name_of, ratio, seconds, wall
from benchmarks.report.targets import Target

TABLE = re.compile(r"<!-- measured (table|targets): ([^>]+?) -->\n+((?:^\|.*\n)+)", re.M)

_TIMES: dict[str, Callable[[Row], float | None]] = {
    "device": seconds,
    "in kernels": in_kernels,
    "wall": wall,
    "least wall": lambda row: min(row["wall"]),
    "most wall": lambda row: max(row["wall"]),
}
_OF_UNITS = {"x": "ratio", "%": "share", "MiB": "peak_bytes", "GB/s": "moved", "TFLOP/s": "flops"}
_PAIRS = {"ratio": ratio, "beyond": beyond}
_NUMBER = re.compile(r"(?P<shown>\d[\d,.]*(?:e-?\d+)? ?(?P<unit>[a-zA-Z%/]+))(?: \((?P<of>.+)\))?")

# A pair of a number as a page shows it and as the results have it.
Pair = tuple[str, str]
Like = Callable[[str, float], str]


def is_of_gpu(document: dict[str, Any]) -> bool:
    """Whether results are those of a check on a GPU."""
    return "rates" in document


def measured(results: Results, case: str, variant: str, quantity: str) -> float:
    """Return what the results hold.

    Raises:
        KeyError: they do not hold it.
    """
    if quantity == "rate":
        return results.rates[variant]
    value: float | None
    if quantity in _PAIRS:
        first, second = (_row(results, case, name.strip()) for name in variant.split(" : "))
        value = _PAIRS[quantity](first, second)
    else:
        value = _of_row(results, _row(results, case, variant), quantity)
    if value is None:
        raise KeyError(f"{case} | {variant} | {quantity}")
    return value


def _row(results: Results, case: str, variant: str) -> Row:
    if case.endswith("..."):
        case = next(name for name in map(_case, results.rows) if name.startswith(case[:-3]))
    for row in results.rows:
        if _case(row) == case and row["variant"] == variant and not row["smaller"]:
            return row
    raise KeyError(f"{case} | {variant}")


def _case(row: Row) -> str:
    return ", ".join(filter(None, name_of(row)))


def _of_row(results: Results, row: Row, quantity: str) -> float | None:
    if quantity in _TIMES:
        return _TIMES[quantity](row)
    spent = seconds(row)
    assert spent is not None
    if quantity == "moved":
        return float(row["moved"]) / spent
    if quantity == "flops":
        return float(row["operations"]) / spent
    if quantity == "share":
        is_product = row["operations"] is not None
        of, rate = ("operations", "product") if is_product else ("moved", "copy")
        return float(row[of]) / spent / results.rates[rate]
    return float(row[quantity])


def of_table(root: Path, found: re.Match[str], like: Like) -> tuple[str, list[Pair]]:
    """Return a table with the numbers of its results, and a pair for each number that it shows.

    Args:
        root: of the repository, where the names of the files begin.
        found: a match of TABLE.
        like: writes a value as a number that is shown.
    """
    kind, files, text = found.groups()
    runs = [json.loads((root / file.strip()).read_text()) for file in files.split(",")]
    head, rule, *body = text.splitlines()
    heads = _cells(head)
    check = _targets(runs) if kind == "targets" else _numbers(runs, like)
    lines, pairs = [head, rule], list[Pair]()
    for line in body:
        cells = _cells(line)
        new = [cells[0], *check(cells[0].replace("`", ""), heads[1:], cells[1:], pairs)]
        lines.append(re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(new)} |"))
    if kind == "targets":
        shown = {_cells(line)[0].replace("`", "") for line in body}
        pairs += [("no row", name) for name in _by_name(runs) if name not in shown]
    before, _, after = found.group().partition(text)
    return before + "".join(f"{line}\n" for line in lines) + after, pairs


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


Check = Callable[[str, Sequence[str], Sequence[str], list[Pair]], Iterator[str]]


def _numbers(runs: Sequence[dict[str, Any]], like: Like) -> Check:
    every = [Results(run) for run in runs]

    def check(
        case: str, heads: Sequence[str], cells: Sequence[str], pairs: list[Pair]
    ) -> Iterator[str]:
        results = next((one for one in every if case in map(_case, one.rows)), None)
        if results is None:
            raise KeyError(f"{case}: not in the results")
        for head, cell in zip(heads, cells, strict=True):
            entries = []
            for entry in filter(None, map(str.strip, cell.split(";"))):
                number = _NUMBER.fullmatch(entry.replace("*", ""))
                if number is None:
                    raise ValueError(f"{case}, {head}: expected a number and a unit, got {entry}")
                variant, time = _heading(head)
                quantity = _OF_UNITS.get(number["unit"], time)
                value = measured(results, case, number["of"] or variant, quantity)
                pairs.append((number["shown"], like(number["shown"], value)))
                entries.append(entry.replace(*pairs[-1]))
            yield "; ".join(entries)

    return check


def _heading(head: str) -> tuple[str, str]:
    """Return the variant and the kind of time that a column is of."""
    variant, _, time = head.replace("`", "").rpartition(", ")
    return (variant, time) if time in _TIMES else (head.replace("`", ""), "device")


def _by_name(runs: Sequence[dict[str, Any]]) -> dict[str, Target]:
    """Return the targets by name: those of the first run that measured them."""
    found: dict[str, Target] = {}
    for run in runs:
        for one in run["targets"]:
            target = Target(**{key: value for key, value in one.items() if key != "verdict"})
            if target.name not in found or found[target.name].met is None:
                found[target.name] = target
    return found


def _targets(runs: Sequence[dict[str, Any]]) -> Check:
    by_name = _by_name(runs)

    def check(
        name: str, heads: Sequence[str], cells: Sequence[str], pairs: list[Pair]
    ) -> Iterator[str]:
        target = by_name[name]
        known = {"wanted": target.wanted, "measured": target.text, "verdict": target.verdict}
        for head, cell in zip(heads, cells, strict=True):
            if head in known:
                pairs.append((cell, known[head]))
            yield known.get(head, cell)

    return check
