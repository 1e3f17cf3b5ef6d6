"""The page and the JSON of a check."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..report.page import Block, Table, markdown, number, time_text
from ..report.targets import Target
from .facts import headline
from .results import Results, Row, name_of, ratio, seconds, wall
from .running import LATE, Outcome
from .targets import GPU, is_for, targets

NAME = "gpu_check"
# So many cases are named that were left out for one reason.
_NAMED = 2
NOTE = """\
Medians over turns that the variants of a case take one after the other; a ratio is the median of
those taken within a turn. Device: between two CUDA events around a call, before which the GPU reads
and writes three times its L2 cache for as long as the host needs to submit the call. In kernels:
the sum of the kernels' own times, as torch.profiler sees them, after the same. Wall: the host's
time a call, of many short calls that are waited for together, or of one long call; caches are as
the call before left them. Launches are kernels, copies are copies and fills. GB/s counts the bytes
that the task must move at least, TFLOP/s the products that it needs, and the shares are those of a
copy of 1 GiB and of a bf16 product of two 8192 x 8192 matrices on this GPU (on a CPU both are
smaller). Peak memory is what a call holds at most beside its inputs. Error: the largest of a loss,
log-probs or advantages against fp64 (of a head: fp32 from logits that are not rounded).

Every variant is right before it is timed: results and gradients are compared with the fp64
reference, of vocabularies for 64 rows, and of a head with fp32. Bare products compute nothing else.
What is called bare computes nothing: an `autograd.Function` that allocates the outputs and launches
a kernel over a few numbers in each pass, which is what PyTorch itself takes of the host's time.
Functions that form gradients in the forward pass have a gradient at the end of it."""
TOO_LATE = f"""\
{LATE} is a stage that was stopped at its time limit, and fails the check. What it says beside that
is what it had counted until then. The rest of it has not run, and nothing is known of that."""
TOO_LATE = " ".join(TOO_LATE.split("\n"))
NOTE = "\n\n".join(" ".join(part.split("\n")) for part in NOTE.split("\n\n"))

Column = tuple[str, Callable[[Row], str]]


def verdicts(results: Results, device: str) -> list[Target]:
    """Return the targets that are for a device, or none."""
    return targets(results) if is_for(device) else []


def write(
    folder: Path,
    found: dict[str, Any],
    outcomes: Sequence[Outcome],
    results: Results,
    failed_tests: Sequence[dict[str, Any]] = (),
) -> None:
    """Write the JSON and the page of what is there so far.

    Args:
        folder: where to.
        found: facts about the machine.
        outcomes: of the stages.
        results: of the measurement.
        failed_tests: by reason, as `tally.Tally` writes them.
    """
    promised = verdicts(results, found["device"])
    document = {
        "machine": found,
        "stages": [outcome._asdict() for outcome in outcomes],
        "targets": [{**vars(target), "verdict": target.verdict} for target in promised],
        "rates": results.rates,
        "failures": results.failures,
        "failed_tests": list(failed_tests),
        "left_out": results.left_out,
    }
    rows = ",\n".join(map(json.dumps, results.rows))
    text = f'{json.dumps(document, indent=1)[:-2]},\n "rows": [\n{rows}\n]}}\n'
    (folder / f"{NAME}.json").write_text(text)
    page = markdown(NAME, _blocks(found, outcomes, results, failed_tests, promised))
    (folder / f"{NAME}.md").write_text(page.rstrip() + "\n")


def _blocks(
    found: dict[str, Any],
    outcomes: Sequence[Outcome],
    results: Results,
    failed_tests: Sequence[dict[str, Any]],
    promised: list[Target],
) -> list[Block]:
    blocks: list[Block] = [headline(found), _rates(results), *stages(outcomes)]
    if failed_tests:
        blocks.append(_tests(failed_tests))
    if promised:
        rows = [(t.name, t.wanted, t.text, t.verdict) for t in promised]
        blocks.append(Table("Targets", ("target", "wanted", "measured", "verdict"), rows))
    else:
        rows = [(t.name, t.wanted) for t in targets(results)]
        title = f"Targets on an {GPU}, which this is not"
        blocks.append(Table(title, ("target", "wanted"), rows))
    blocks += [_table(results, str(name), rows) for name, rows in results.of_cases()]
    for title, lines in (("Failures", results.failures), ("Left out", results.left_out)):
        if lines:
            blocks.append(Table(title, ("variant", "case", "why"), _by_reason(lines)))
    smaller = dict.fromkeys((_case(row), row["smaller"]) for row in results.rows if row["smaller"])
    if smaller:
        blocks.append(Table("Smaller than their names say", ("case", "what it is"), list(smaller)))
    return [*blocks, NOTE]


def stages(outcomes: Sequence[Outcome]) -> list[Block]:
    """Return the table of what was run, and what its verdicts mean where that is not plain."""
    rows = [(one.name, one.word, f"{one.seconds:.0f} s", _cell(one.said)) for one in outcomes]
    table = Table("Stages", ("stage", "verdict", "time", "what it says"), rows)
    return [table, *([TOO_LATE] if any(one.word == LATE for one in outcomes) else [])]


def _tests(failed: Sequence[dict[str, Any]]) -> Table:
    """Return why tests failed, the most frequent reason first, and which these are."""
    rows = []
    for one in sorted(failed, key=lambda one: -int(one["count"])):
        more = one["count"] - len(one["tests"])
        names = "; ".join(one["tests"]) + (f"; and {more} more" if more else "")
        rows.append((str(one["count"]), _cell(one["why"]), _cell(names)))
    return Table("Failures of tests", ("tests", "why", "which"), rows)


def _rates(results: Results) -> str:
    if not results.rates:
        return ""
    copied, product = results.rates["copy"] / 1e9, results.rates["product"] / 1e12
    return f"A copy moves {number(copied)} GB/s, and a bf16 product does {number(product)} TFLOP/s."


def _by_reason(lines: list[Row]) -> list[tuple[str, ...]]:
    """Return a row for each variant and reason; many cases are a number."""
    cases: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        cases.setdefault((line["variant"] or "", _cell(line["why"])), []).append(_case(line))
    return [
        (variant, "; ".join(names) if len(names) <= _NAMED else f"{len(names)} cases", why)
        for (variant, why), names in cases.items()
    ]


def _case(line: Row) -> str:
    return ", ".join(filter(None, name_of(line)))


def _cell(text: str) -> str:
    """Return a text that ends no cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _table(results: Results, title: str, rows: list[Row]) -> Table:
    """Return the rows of a case, with the columns that have something in them."""
    filled = [
        (header, cells)
        for header, text in _columns(results, rows[0])
        if any(cells := [text(row) for row in rows])
    ]
    body = list(zip(*(cells for _, cells in filled), strict=True))
    return Table(title, [header for header, _ in filled], body)


def _columns(results: Results, first: Row) -> list[Column]:
    copied, product = results.rates.get("copy"), results.rates.get("product")

    def rate(key: str, of: float | None, unit: float) -> Callable[[Row], str]:
        """Return what writes a rate in its unit, or as a share of another."""
        scale = 1 / unit if of is None else 100 / of
        suffix = "" if of is None else " %"
        return lambda row: (
            "" if row[key] is None else number(scale * row[key] / _spent(row), suffix)
        )

    return [
        ("variant", lambda row: str(row["variant"])),
        ("device", lambda row: _time(row["device"] and statistics.median(row["device"]))),
        ("in kernels", lambda row: _time(row["kernel_seconds"])),
        ("wall", lambda row: _time(wall(row))),
        ("first is faster by", lambda row: "" if row is first else number(ratio(row, first), "x")),
        ("launches", lambda row: _whole(row["launches"])),
        ("copies", lambda row: _whole(row["copies"])),
        ("GB/s", rate("moved", None, 1e9)),
        ("% of copy", rate("moved", copied, 1.0) if copied else lambda row: ""),
        ("TFLOP/s", rate("operations", None, 1e12)),
        ("% of product", rate("operations", product, 1.0) if product else lambda row: ""),
        ("peak memory", lambda row: _bytes(row["peak_bytes"])),
        ("error", lambda row: "" if row["error"] is None else f"{row['error']:.1e}"),
    ]


def _spent(row: Row) -> float:
    found = seconds(row)
    assert found is not None
    return found


def _time(value: float | None) -> str:
    return "" if value is None else time_text(value)


def _whole(value: int | None) -> str:
    return "" if value is None else str(value)


def _bytes(value: int) -> str:
    return number(value / 2**20, " MiB")
