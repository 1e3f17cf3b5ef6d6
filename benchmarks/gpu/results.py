"""The rows of a run, as the targets and the page read them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from ..variants import Variant
from .problem import Name

Row = dict[str, Any]


class Results:
    """What `benchmarks.gpu.measure` wrote.

    Attributes:
        rates: bytes and operations a second of a copy and a product; may be empty.
        rows, left_out, failures: as `Measured` has them.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.rates: dict[str, float] = document.get("rates", {})
        self.rows: list[Row] = document.get("rows", [])
        self.left_out: list[Row] = document.get("left_out", [])
        self.failures: list[Row] = document.get("failures", [])

    def get(self, name: Name, variant: Variant) -> Row | None:
        """Return a row, or None if it was not measured on the inputs that the name says."""
        for row in self.rows:
            if name_of(row) == name and row["variant"] == variant.name and not row["smaller"]:
                return row
        return None

    def of_cases(self) -> Iterator[tuple[Name, list[Row]]]:
        """Yield the rows of each case, in the order in which they were measured."""
        for name in dict.fromkeys(map(name_of, self.rows)):
            yield name, [row for row in self.rows if name_of(row) == name]


def name_of(row: Row) -> Name:
    """Return the name of a row's case."""
    return Name(row["function"], row["how"], row["shape"])


def turns(row: Row) -> list[float]:
    """Return the seconds of each turn: of the device, or of the host where there are no others."""
    found: list[float] = row["wall"] if row["device"] is None else row["device"]
    return found


def seconds(row: Row | None) -> float | None:
    """Return the median over the turns."""
    return None if row is None else statistics.median(turns(row))


def wall(row: Row | None) -> float | None:
    """Return the host's median."""
    return None if row is None else statistics.median(row["wall"])


def in_kernels(row: Row | None) -> float | None:
    """Return the seconds that kernels take, or those of the device if they are not known."""
    if row is None or row["kernel_seconds"] is None:
        return seconds(row)
    return float(row["kernel_seconds"])


def beyond(row: Row | None, floor: Row | None) -> float | None:
    """Return what `row` takes of the host beyond `floor`, in the median of their turns."""
    if row is None or floor is None:
        return None
    pairs = zip(row["wall"], floor["wall"], strict=False)
    return statistics.median(one - other for one, other in pairs)


def ratio(row: Row | None, other: Row | None) -> float | None:
    """Return how many times longer `row` takes than `other`, in the median of their turns."""
    if row is None or other is None:
        return None
    pairs = zip(turns(row), turns(other), strict=False)
    return statistics.median(one / two for one, two in pairs)
