"""The rule by which Triton's interpreter runs a part of a grid: nothing of an axis is left out."""

from __future__ import annotations

import itertools

import pytest
from grids import Grid

_AXES = {
    "ratio": ["geometric", "product", "centered"],
    "reduction": ["step_mean", "trajectory_mean", "token_mean", "sum"],
    "dual_clip": [None, 3.0],
    "masked": {"layout": False, "mask": True},
}


def values_of(axis):
    return list(axis.values()) if isinstance(axis, dict) else axis


@pytest.mark.parametrize("cover", [1, 2, 3, 4])
def test_any_axes_take_each_combination_of_their_values(cover):
    found = [case.values for case in Grid(_AXES, cover, {}).cases(interpreted=True)]
    for chosen in itertools.combinations(range(len(_AXES)), cover):
        axes = [values_of(list(_AXES.values())[place]) for place in chosen]
        seen = {tuple(values[place] for place in chosen) for values in found}
        assert seen == set(itertools.product(*axes))


def test_few_cases_cover_the_values_and_their_pairs():
    """They are as many as the longest axis has values, and as the two longest have pairs."""
    counts = [len(Grid(_AXES, cover, {}).cases(interpreted=True)) for cover in (1, 2)]
    assert counts == [4, 12]
    assert len(Grid(_AXES, 1, {}).cases()) == 3 * 4 * 2 * 2


def test_cases_are_named_by_their_values_and_are_the_same_every_time():
    grid = Grid(_AXES, 2, {})
    found = grid.cases(interpreted=True)
    assert found[0] == ("geometric-step_mean-None-layout", ("geometric", "step_mean", None, False))
    assert found == grid.cases(interpreted=True)
    assert len({case.name for case in found}) == len(found)
    assert [case for case in grid.cases() if case in found] == found


def test_values_may_stand_for_an_axis():
    grid = Grid({"rows": [1, 2, 70_000], "dtype": ["fp32", "fp64"]}, 2, {"rows": [2]})
    assert [case.values for case in grid.cases(interpreted=True)] == [(2, "fp32"), (2, "fp64")]
    assert len(grid.cases()) == 6


def test_the_interpreter_meets_every_value_of_every_grid_of_the_suite(request):
    """Each grid of the files that were collected together with this one is looked at."""
    marks = [item.get_closest_marker("grid") for item in request.session.items]
    for (grid,) in {id(mark): mark.args for mark in marks if mark}.values():
        columns = zip(*(case.values for case in grid.cases(interpreted=True)), strict=True)
        for (name, axis), seen in zip(grid.axes.items(), columns, strict=True):
            assert set(map(repr, seen)) <= set(map(repr, values_of(axis)))
            wanted = grid.interpreted.get(name, axis)
            assert set(map(repr, seen)) == set(map(repr, values_of(wanted))), name
