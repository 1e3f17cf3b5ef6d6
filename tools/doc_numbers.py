"""Numbers of the documentation that come from benchmarks/results, and whether they still do.

A section of a page lists them in a comment that no reader sees, a line for each number:

    <!-- measured: benchmarks/results/vocabulary.json
    354 ms | linear_loss | 1024 tokens, 8 steps of 32, V 151936 | fused | time
    14.9x | linear_loss | 1024 tokens, 8 steps of 32, V 151936 | eager : fused | ratio
    28 ms | linear_loss | curve vocabulary 16384 | fused | time
    -->

The parts of a line are the number as the text below shows it, the suite, the case (or a curve and
a place on its axis), the variant and the quantity. That is `time`, `ratio` of two variants,
`beyond` for the time of the first beyond the second, or a key of the measurement such as
`extra_bytes`. Parts after these narrow it down: `1` is the number of threads, `cold` or `warm` the
mode. Without a mode a number is the cold one where the results have it. Text up to the next heading
of the page must show each number, rounded as it is shown. `tools/gpu_numbers.py` says how lists and
tables name what was measured on a GPU.

``python -m tools.doc_numbers`` lists the numbers that differ and exits with 1 if there are any;
with ``--write`` it puts the new ones into the pages.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.results import Results as GpuResults
from benchmarks.modes import MODES
from benchmarks.report.results import Line, Results
from benchmarks.variants import Variant

from . import gpu_numbers

ROOT = Path(__file__).parents[1]
UNITS = {"us": 1e-6, "ms": 1e-3, "ns": 1e-9, "KiB": 2.0**10, "MiB": 2.0**20, "%": 1e-2}
UNITS |= {"GB/s": 1e9, "TFLOP/s": 1e12}

_SECTION = re.compile(r"<!-- measured: (\S+)\n(.*?)-->(.*?)(?=^#|^<!-- measured:|\Z)", re.S | re.M)
_SHOWN = re.compile(r"([\d,]+)(\.\d+)?(e-?\d+)? ?(\D*)")


@dataclass(frozen=True)
class Number:
    """A number of a page.

    Attributes:
        shown: the number as the page says it.
        measured: the same with the value of the results.
        found: how often the text of the section shows it.
    """

    page: Path
    shown: str
    measured: str
    found: int

    @property
    def problem(self) -> str | None:
        """What is wrong, None if nothing is."""
        if self.found == 0:
            return f"{self.shown}: the section does not show it"
        return None if self.shown == self.measured else f"{self.shown} is now {self.measured}"


def pages() -> list[Path]:
    """Return the pages that may hold numbers."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def numbers(page: Path) -> Iterator[Number]:
    """Yield the numbers that a page lists, and those of its tables of a GPU."""
    text = page.read_text()
    for section in _SECTION.finditer(text):
        yield from of_section(page, *section.groups())
    for table in gpu_numbers.TABLE.finditer(text):
        for shown, now in gpu_numbers.of_table(ROOT, table, like)[1]:
            yield Number(page, shown, now, 1)


def of_section(page: Path, source: str, listed: str, text: str) -> Iterator[Number]:
    """Yield the numbers that a section of a page lists."""
    document = json.loads((ROOT / source).read_text())
    find: Callable[..., float]
    if gpu_numbers.is_of_gpu(document):
        find = functools.partial(gpu_numbers.measured, GpuResults(document))
    else:
        find = functools.partial(measured, Results(document))
    for entry in filter(None, map(str.strip, listed.splitlines())):
        shown, *where = (part.strip() for part in entry.split("|"))
        found = len(occurrences(shown).findall(text))
        yield Number(page, shown, like(shown, find(*where)), found)


def occurrences(*shown: str) -> re.Pattern[str]:
    """Return what finds numbers in a text; it may break the line before a unit."""
    words = (r"\s+".join(map(re.escape, one.split())) for one in shown)
    return re.compile(rf"(?<![\d.,])(?:{'|'.join(words)})(?![\w.]*\d)")


def like(shown: str, value: float) -> str:
    """Return a value with the unit and the decimal places of a number that is shown."""
    match = _SHOWN.fullmatch(shown)
    if match is None:
        raise ValueError(f"{shown}: expected a number and a unit")
    whole, decimals, exponent, unit = match.groups()
    places = len(decimals or ".") - 1
    value /= UNITS.get(unit, 1.0)
    if exponent:
        mantissa, power = f"{value:.{places}e}".split("e")
        text = f"{mantissa}e{int(power)}"
    else:
        text = f"{value:{',' if ',' in whole else ''}.{places}f}"
    return text + shown[match.end(3) if exponent else match.end(2 if decimals else 1) :]


def measured(
    results: Results, suite: str, case: str, variant: str, quantity: str, *narrowed: str
) -> float:
    """Return what the results hold."""
    threads, mode = 0, None
    for part in narrowed:
        if part in MODES:
            mode = part
        else:
            threads = int(part)

    def line(name: str) -> Line:
        if case.startswith("curve "):
            _, curve, place = case.split()
            return results.curve(curve, suite, Variant(name), mode)[float(place)]
        found = results.get(suite, case, Variant(name), threads, mode)
        if found is None:
            raise KeyError(f"{suite} | {case} | {name} | {mode or 'any mode'}")
        return found

    value: float | None
    if quantity in ("ratio", "beyond"):
        first, second = (line(name.strip()) for name in variant.split(":"))
        value = getattr(results, quantity)(first, second)
    elif quantity == "time":
        value = line(variant).median
    else:
        value = line(variant).over_turns(quantity)
    if value is None:
        raise KeyError(f"{suite} | {case} | {variant} | {quantity}")
    return value


def rewrite(page: Path) -> None:
    """Put the measured numbers into a page: into its lists, and into the text below them.

    A number that a section shows for two quantities that now differ is left as it is.
    """

    def section(match: re.Match[str]) -> str:
        now: dict[str, set[str]] = {}
        for number in of_section(page, *match.groups()):
            now.setdefault(number.shown, set()).add(number.measured)
        one = {shown: measured.pop() for shown, measured in now.items() if len(measured) == 1}
        if not one:
            return match.group()

        def number(found: re.Match[str]) -> str:
            return one[" ".join(found.group().split())]

        return occurrences(*one).sub(number, match.group())

    def table(found: re.Match[str]) -> str:
        return gpu_numbers.of_table(ROOT, found, like)[0]

    text = _SECTION.sub(section, page.read_text())
    page.write_text(gpu_numbers.TABLE.sub(table, text))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, help="README.md and docs/*.md by default")
    parser.add_argument("--write", action="store_true", help="put the new numbers into the pages")
    options = parser.parse_args(arguments)
    problems = 0
    for page in options.pages or pages():
        for number in numbers(page):
            if number.problem:
                problems += 1
                print(f"{page.name}: {number.problem}")
        if options.write:
            rewrite(page)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
