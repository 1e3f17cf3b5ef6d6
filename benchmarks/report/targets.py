"""Promises, and whether a run keeps them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..variants import Variant
from .page import digits
from .results import Line, Results


@dataclass(frozen=True)
class Target:
    """One promise and what was measured; None is "not measured"."""

    name: str
    wanted: str
    measured: float | None
    met: bool | None
    unit: str

    @property
    def verdict(self) -> str:
        """In one word."""
        return {True: "met", False: "MISSED", None: "not measured"}[self.met]

    @property
    def text(self) -> str:
        """What was measured."""
        return "-" if self.measured is None else f"{digits(self.measured)}{self.unit}"


class Targets:
    """The promises of a family of suites, in the order in which they are made."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.found: list[Target] = []

    def add(
        self,
        name: str,
        wanted: str,
        measured: float | None,
        holds: Callable[[float], bool],
        unit: str = "x",
    ) -> None:
        """Make a promise."""
        met = None if measured is None else holds(measured)
        self.found.append(Target(name, wanted, measured, met, unit))

    def faster(
        self,
        name: str,
        variant: Variant,
        peer: Line | None,
        factor: float,
        ours: Line | None,
    ) -> None:
        """Promise that `peer`, the line of `variant`, takes at least `factor` times as long."""
        ratio = self.results.ratio(peer, ours)
        self.add(
            f"{name}: faster than {variant}",
            f">= {factor:g}x",
            ratio,
            lambda value: value >= factor,
        )

    def at_most(
        self, name: str, variant: Variant, other: Line | None, factor: float, ours: Line | None
    ) -> None:
        """Promise that we take at most `factor` times as long as `other`, the line of `variant`."""
        ratio = self.results.ratio(ours, other)
        self.add(
            f"{name}: over the {variant}", f"<= {factor:g}x", ratio, lambda value: value <= factor
        )
