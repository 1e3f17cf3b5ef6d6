"""What a run measured: a line for each variant and mode, over its turns."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from ..modes import MODES, WARM
from ..variants import Variant


@dataclass(frozen=True)
class Line:
    """A variant of a case at a number of threads, cold or warm, over all turns."""

    suite: str
    case: str
    variant: str
    threads: int
    mode: str
    seconds: dict[int, float]  # by turn
    info: list[dict[str, Any]]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds.values())

    def over_turns(self, key: str) -> float | None:
        """Return the median of an entry of `info`, None where it was not measured."""
        found = [info[key] for info in self.info if key in info]
        return statistics.median(found) if found else None


class Results:
    """The lines of a run, by (suite, case, variant, threads, mode); those of curves apart.

    A curve is found by its name, suite, variant and mode, and has a line for each place on its
    axis. Where a mode may be left out, it is cold for what was timed cold, and warm for the rest.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.machine: dict[str, Any] = document["machine_info"]
        self.family: str = self.machine["family"]
        # Versions by name, None for a peer that is not there.
        self.peers: dict[str, str | None] = self.machine["peers"]
        self.lines: dict[tuple[str, str, str, int, str], Line] = {}
        self.curves: dict[tuple[str, str, str, str], dict[float, Line]] = {}
        for entry in document["benchmarks"]:
            info = entry["extra_info"]
            mode = info.get("mode", WARM)
            key = info["suite"], info["case"], info["variant"], info["threads"], mode
            name = info.get("curve", "tokens" if info.get("growth") else None)
            if name is None:
                line = self.lines.setdefault(key, Line(*key, {}, []))
            else:
                curve = self.curves.setdefault((name, info["suite"], info["variant"], mode), {})
                line = curve.setdefault(info.get("x", info["tokens"]), Line(*key, {}, []))
            line.seconds[info["turn"]] = entry["stats"]["median"]
            line.info.append(info)

    @property
    def threads(self) -> int:
        """What torch uses unless told otherwise."""
        return int(self.machine["threads"])

    def get(
        self,
        suite: str,
        case: str,
        variant: Variant,
        threads: int | None = None,
        mode: str | None = None,
    ) -> Line | None:
        """Return a line, or None if it was not measured."""
        place = suite, case, variant.name, threads or self.threads
        found = (self.lines.get((*place, one)) for one in ((mode,) if mode else MODES))
        return next((line for line in found if line is not None), None)

    def of_case(
        self, suite: str, case: str, threads: int | None = None, mode: str | None = None
    ) -> list[Line]:
        """Return the lines of a case, in the order in which they were measured."""
        wanted = suite, case, threads or self.threads
        for one in (mode,) if mode else MODES:
            lines = [line for line in self.lines.values() if _place(line) == (*wanted, one)]
            if lines:
                return lines
        return []

    def curve(
        self, name: str, suite: str, variant: Variant, mode: str | None = None
    ) -> dict[float, Line]:
        """Return the lines of a curve by place; none if it was not measured."""
        modes = (mode,) if mode else MODES
        found = (self.curves.get((name, suite, variant.name, one)) for one in modes)
        return next((curve for curve in found if curve), {})

    def ratio(self, line: Line | None, *others: Line | None) -> float | None:
        """Return how many times longer `line` takes than the fastest of `others`.

        Taken within each turn that all of them have; the median over these.
        """
        if line is None or not others or any(other is None for other in others):
            return None
        seconds = [other.seconds for other in others if other is not None]
        turns = line.seconds.keys() & set.intersection(*(set(one) for one in seconds))
        ratios = [line.seconds[turn] / min(one[turn] for one in seconds) for turn in turns]
        return statistics.median(ratios) if ratios else None

    def beyond(self, line: Line | None, other: Line | None) -> float | None:
        """Return how many seconds longer `line` takes than `other`, by turns as `ratio` is."""
        if line is None or other is None:
            return None
        turns = line.seconds.keys() & other.seconds.keys()
        more = [line.seconds[turn] - other.seconds[turn] for turn in turns]
        return statistics.median(more) if more else None

    def places(self, name: str) -> list[float]:
        """Return where on its axis the curves of a name were measured."""
        return sorted({x for (of, *_), curve in self.curves.items() if of == name for x in curve})

    def slope(
        self, name: str, suite: str, variant: Variant, mode: str | None = None
    ) -> float | None:
        """Return d log seconds / d log x of a curve by least squares.

        The constant cost of a call lowers it, leaving the caches raises it.
        """
        points = [
            (math.log(x), math.log(line.median))
            for x, line in self.curve(name, suite, variant, mode).items()
        ]
        if len(points) < 3:
            return None
        return statistics.linear_regression(*zip(*points, strict=True)).slope


def _place(line: Line) -> tuple[str, str, int, str]:
    return line.suite, line.case, line.threads, line.mode
