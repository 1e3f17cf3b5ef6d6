"""Measures all cases in processes of their own, one after the other, and goes on where one ends.

``python -m benchmarks.gpu.measure --device cuda:0 --size full --seconds 170 --out rows.json``
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from .cases import GROUPS, SIZES, cases, groups
from .order import in_order
from .problem import Name
from .results import name_of
from .variants import OURS

# A process begins no case when the time is up, and is stopped this much later.
GRACE = 10.0
# It is stopped before that if it has written nothing for so long: then a call hangs.
_SILENCE, _LOOK = 75.0, 0.2
# The most processes: what ends many of them is not one variant.
_MOST_PROCESSES = 12


class Measured:
    """What the lines of all processes say.

    Attributes:
        rates: bytes and operations a second; empty if they were not measured.
        rows: the measurements.
        left_out: variants that are not ours, and cases, with the reasons.
        failures: what is ours and is wrong or raised.
    """

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        return vars(self)


def measure(
    device: str,
    size: str,
    seconds: float,
    only: str = "",
    worker: str = "benchmarks.gpu.worker",
    wanted: Collection[str] = GROUPS,
    measured: Mapping[str, str] = MappingProxyType({}),
) -> Measured:
    """Return what was measured in about so many seconds.

    Args:
        device: such as ``cuda:0``.
        size: one of `SIZES`.
        seconds: until when cases are begun.
        only: part of the names of the cases that are wanted.
        worker: the module that measures.
        wanted: the groups whose cases are wanted.
        measured: when a case was last measured, by the text of its name.
    """
    found, end = Measured(), time.monotonic() + seconds
    names = [case.name for case in cases(size)]
    of_groups = {
        group: [case.name for case in of_group if only in str(case.name)]
        for group, of_group in groups(size).items()
        if group in wanted
    }
    ordered = in_order(of_groups, measured)
    todo: dict[int, dict[str, str]] = {names.index(name): {} for name in ordered}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        for _ in range(_MOST_PROCESSES):
            left = end - time.monotonic()
            if not todo or left <= 0:
                break
            path.write_text("")
            plan = {"rates": not found.rates, "cases": list(todo.items())}
            words = [sys.executable, "-m", worker, "--device", device, "--size", size]
            words += ["--seconds", f"{left:.1f}", "--lines", str(path), "--plan", json.dumps(plan)]
            ended = _run(words, path, left + GRACE)
            _read(path, ended, names, todo, found)
    for number in todo:
        found.left_out.append(
            names[number]._asdict() | {"variant": None, "why": "no time was left"}
        )
    found.rows.sort(key=lambda row: names.index(name_of(row)))
    return found


class Ended(NamedTuple):
    """How a process ended: why it did before its work was done, or that its time was up."""

    why: str = ""
    is_time_up: bool = False


def _run(words: list[str], path: Path, seconds: float) -> Ended:
    """Run a process that writes lines to a file."""
    end = time.monotonic() + seconds
    with subprocess.Popen(words) as process:
        while process.poll() is None:
            time.sleep(_LOOK)
            silence = time.time() - path.stat().st_mtime
            if silence > _SILENCE or time.monotonic() > end:
                process.kill()
                is_time_up = time.monotonic() > end
                return Ended(f"it had not returned after {silence:.0f} s", is_time_up)
    code = process.returncode
    if code < 0:
        return Ended(f"the process ended by signal {-code}")
    return Ended(f"the process ended with {code}" if code else "")


def _read(
    path: Path, ended: Ended, names: list[Name], todo: dict[int, dict[str, str]], found: Measured
) -> None:
    """Take the lines of a process, strike what is done, and say what ended it."""
    current: int | None = None
    variant: str | None = None
    why, is_written = ended.why, False
    # A process that is killed leaves half a line.
    for text in path.read_text().split("\n")[:-1]:
        line = json.loads(text)
        kind = line.pop("kind")
        if kind == "rates":
            found.rates = line
        elif kind == "row":
            found.rows.append(line)
        elif kind == "left out":
            found.left_out.append(line)
        elif kind == "failure":
            if line not in found.failures:
                found.failures.append(line)
        elif kind == "call":
            variant = line["variant"]
        elif kind == "lost":
            why, is_written = line["why"], _is_ours(line["variant"])
        elif kind in ("begin", "end"):
            number = names.index(Name(**line))
            current = number if kind == "begin" else None
            if kind == "end":
                del todo[number]
    if current is not None:
        begun = names[current]._asdict()
        # The case is begun again, and what is left out of it is written again.
        found.left_out = [line for line in found.left_out if not begun.items() <= line.items()]
    if ended.is_time_up:
        return
    if current is not None:
        if _is_ours(variant) and not is_written:
            found.failures.append(begun | {"variant": variant, "why": why})
        if variant is None:
            del todo[current]
        else:
            todo[current][variant] = why
    elif why:
        # It is no case that ends the process, and another process would end as well.
        nothing = Name("the measurement", "", "")._asdict()
        found.failures.append(nothing | {"variant": None, "why": why})
        todo.clear()


def _is_ours(variant: str | None) -> bool:
    """Whether what goes wrong is a failure: with a variant of this package, or with none."""
    return variant is None or variant in {one.name for one in OURS}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--seconds", type=float, default=170.0)
    parser.add_argument("--only", default="", help="part of the names of cases")
    parser.add_argument("--groups", default=",".join(GROUPS), help="of cases, with commas")
    parser.add_argument("--measured", type=Path, help="JSON: when each case was last measured")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    found = measure(
        options.device,
        options.size,
        options.seconds,
        options.only,
        wanted=options.groups.split(","),
        measured={} if options.measured is None else json.loads(options.measured.read_text()),
    )
    options.out.write_text(json.dumps(found.as_json()))
    for line in found.failures:
        print("FAILED:", ", ".join(str(value) for value in line.values()))
    print(f"{len(found.rows)} rows, {len(found.failures)} failures, {len(found.left_out)} left out")
    return 1 if found.failures or not found.rows else 0


if __name__ == "__main__":
    sys.exit(main())
