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


def grid(*, cover: int = 2, **axes: Axis) -> pytest.MarkDecorator:
    """Run a test that takes `target` or `kernel` on combinations of values of `axes`.

    Compiled kernels and the reference run all of them. Triton's interpreter is a thousand times
    slower. It runs a set in which any `cover` axes take each combination of their values: with 2
    each pair of values occurs, with 1 each value. The fixture `masked` of a test is an axis too.
    `pytest --collect-only` lists the cases.

    Args:
        cover: the number of axes whose combinations all occur in the interpreter.
        **axes: the values of each argument of the test, in a mapping by the names that they have
            in the test's id.

    Returns:
        The mark that `conftest.py` reads.
    """
    return pytest.mark.grid(axes, cover)


def cases(axes: Mapping[str, Axis], cover: int | None = None) -> list[Case]:
    """Return all combinations of values of `axes`, or those that cover any `cover` axes."""
    named = [_named(values) for values in axes.values()]
    sizes = [range(len(values)) for values in named]
    chosen = list(itertools.product(*sizes)) if cover is None else covering(sizes, cover)
    found = []
    for places in chosen:
        names, values = zip(
            *(axis[place] for axis, place in zip(named, places, strict=True)), strict=True
        )
        found.append(Case("-".join(names), values))
    return found


def covering(sizes: Sequence[range], cover: int) -> list[tuple[int, ...]]:
    """Return few elements of the product in which any `cover` axes take each combination.

    They are chosen one after another. Each is the first of those that add the most combinations.
    """
    groups = list(itertools.combinations(range(len(sizes)), min(cover, len(sizes))))
    combinations = {
        places: {(group, tuple(places[axis] for axis in group)) for group in groups}
        for places in itertools.product(*sizes)
    }
    missing = set().union(*combinations.values())
    chosen = []
    while missing:
        best = max(combinations, key=lambda places: len(combinations[places] & missing))
        chosen.append(best)
        missing -= combinations[best]
    return sorted(chosen)


def _named(axis: Axis) -> list[tuple[str, Any]]:
    if isinstance(axis, Mapping):
        return list(axis.items())
    return [(getattr(value, "__name__", str(value)), value) for value in axis]
