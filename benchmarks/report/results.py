"""What a run measured: a line for each variant, over its turns."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from ..variants import Variant


@dataclass(frozen=True)
class Line:
    """A variant of a case at a number of threads, over all turns."""

    suite: str
    case: str
    variant: str
    threads: int
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
    """The lines of a run, by (suite, case, variant, threads); those of curves apart.

    A curve is found by its name, suite and variant, and has a line for each place on its axis.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.machine: dict[str, Any] = document["machine_info"]
        self.family: str = self.machine["family"]
        # Versions by name, None for a peer that is not there.
        self.peers: dict[str, str | None] = self.machine["peers"]
        self.lines: dict[tuple[str, str, str, int], Line] = {}
        self.curves: dict[tuple[str, str, str], dict[float, Line]] = {}
        for entry in document["benchmarks"]:
            info = entry["extra_info"]
            key = info["suite"], info["case"], info["variant"], info["threads"]
            name = info.get("curve", "tokens" if info.get("growth") else None)
            if name is None:
                line = self.lines.setdefault(key, Line(*key, {}, []))
            else:
                curve = self.curves.setdefault((name, info["suite"], info["variant"]), {})
                line = curve.setdefault(info.get("x", info["tokens"]), Line(*key, {}, []))
            line.seconds[info["turn"]] = entry["stats"]["median"]
            line.info.append(info)

    @property
    def threads(self) -> int:
        """What torch uses unless told otherwise."""
        return int(self.machine["threads"])

    def get(
        self, suite: str, case: str, variant: Variant, threads: int | None = None
    ) -> Line | None:
        """Return a line, or None if it was not measured."""
        return self.lines.get((suite, case, variant.name, threads or self.threads))

    def of_case(self, suite: str, case: str, threads: int | None = None) -> list[Line]:
        """Return the lines of a case, in the order in which they were measured."""
        wanted = suite, case, threads or self.threads
        return [line for line in self.lines.values() if _place(line) == wanted]

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

    def places(self, name: str) -> list[float]:
        """Return where on its axis the curves of a name were measured."""
        return sorted({x for (of, *_), curve in self.curves.items() if of == name for x in curve})

    def slope(self, name: str, suite: str, variant: Variant) -> float | None:
        """Return d log seconds / d log x of a curve by least squares.

        The constant cost of a call lowers it, leaving the caches raises it.
        """
        points = [
            (math.log(x), math.log(line.median))
            for x, line in self.curves.get((name, suite, variant.name), {}).items()
        ]
        if len(points) < 3:
            return None
        return statistics.linear_regression(*zip(*points, strict=True)).slope


def _place(line: Line) -> tuple[str, str, int]:
    return line.suite, line.case, line.threads
