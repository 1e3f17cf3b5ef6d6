"""Grids of cases: every combination of their axes, or in Triton's interpreter a covering set."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytest

Axis = Sequence[Any] | Mapping[str, Any]


class Case(NamedTuple):
    """One value of each axis, and the name of the case in a test's id."""

    name: str
    values: tuple[Any, ...]


class Grid(NamedTuple):
    """The axes of a test, by the names of its arguments, and what the interpreter runs of them."""

    axes: Mapping[str, Axis]
    cover: int
    interpreted: Mapping[str, Axis]

    def cases(self, *, interpreted: bool = False) -> list[Case]:
        """Return all combinations, or the covering set."""
        axes = {**self.axes, **self.interpreted} if interpreted else self.axes
        named = [_named(values) for values in axes.values()]
        cover = self.cover if interpreted else len(named)
        chosen = covering([range(len(values)) for values in named], cover)
        picked = [
            [axis[place] for axis, place in zip(named, places, strict=True)] for places in chosen
        ]
        return [
            Case("-".join(name for name, _ in pairs), tuple(value for _, value in pairs))
            for pairs in picked
        ]


def grid(
    *, cover: int = 2, interpreted: Mapping[str, Axis] | None = None, **axes: Axis
) -> pytest.MarkDecorator:
    """Run a test that takes `target`, `kernel` or `gpu_kernel` on combinations of values of `axes`.

    Compiled kernels and the reference run all of them. Triton's interpreter is a thousand times
    slower. It runs a set in which any `cover` axes take each combination of their values: with 2
    each pair of values occurs, with 1 each value. The fixture `masked` of a test is an axis too.
    `pytest --collect-only` lists the cases.

    Args:
        cover: the number of axes whose combinations all occur in the interpreter.
        interpreted: the values of an axis that stand for all of them in the interpreter.
        **axes: the values of each argument of the test, in a mapping by the names that they have
            in the test's id.

    Returns:
        The mark that `conftest.py` reads.
    """
    return pytest.mark.grid(Grid(axes, cover, interpreted or {}))


def covering(sizes: Sequence[range], cover: int) -> list[tuple[int, ...]]:
    """Return few elements of the product in which any `cover` axes take each combination.

    They are chosen one after another. Each is the first of those that add the most combinations.
    """
    product = list(itertools.product(*sizes))
    if cover >= len(sizes):
        return product
    groups = list(itertools.combinations(range(len(sizes)), cover))
    combinations = {
        places: {(group, tuple(places[axis] for axis in group)) for group in groups}
        for places in product
    }
    missing = set().union(*combinations.values())
    chosen = []
    while missing:
        best = max(product, key=lambda places: len(combinations[places] & missing))
        chosen.append(best)
        missing -= combinations[best]
    return sorted(chosen)


def _named(axis: Axis) -> list[tuple[str, Any]]:
    if isinstance(axis, Mapping):
        return list(axis.items())
    return [(getattr(value, "__name__", str(value)), value) for value in axis]
