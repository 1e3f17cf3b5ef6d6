"""Gradients of patched models under DDP and FSDP2, with and without a head that is split."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the demo's extra is not installed")

from data_parallel_models import EVERY, FSDP_RUNS, SHARDED, check_data, two_dimensional
from worlds import Worlds

pytestmark = pytest.mark.skipif(not FSDP_RUNS, reason="FSDP2 of this torch needs a GPU")


def wrong_cases(rank: int, size: int, names: list[str]) -> list[str]:
    return [what for name in names for what in check_data(EVERY[name], size)]


def test_gradients_are_those_of_the_whole_batch(worlds: Worlds) -> None:
    assert worlds.run(2, wrong_cases, [case.name for case in SHARDED]) == [[], []]


@pytest.mark.parametrize("dims", [(1, 2), (2, 1), (2, 2)], ids=str)
def test_in_two_dimensions(worlds: Worlds, dims: tuple[int, int]) -> None:
    size = dims[0] * dims[1]
    names = [case.name for case in two_dimensional(dims)]
    assert worlds.run(size, wrong_cases, names) == [[]] * size
