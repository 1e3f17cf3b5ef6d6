"""Layouts and sets as arguments of processes that are started."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from steppo_kernels import StepLayout, TokenSupport

_MASK = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]])
_SETS = torch.tensor([[7, 3], [5, -1]])


def objects() -> tuple[StepLayout, TokenSupport]:
    return StepLayout.from_mask(_MASK, backend="reference"), TokenSupport.from_padded(_SETS)


def look(rank: int, layout: StepLayout, support: TokenSupport) -> None:
    """Raise in a process that was given other objects."""
    own_layout, own_support = objects()
    for name, value in own_layout.tensors().items():
        assert torch.equal(layout.tensors()[name], value)
    assert torch.equal(support.ids, own_support.ids)
    assert torch.equal(support.offsets, own_support.offsets)


@pytest.fixture(params=sorted(mp.get_all_sharing_strategies()))
def strategy(request):
    before = mp.get_sharing_strategy()
    mp.set_sharing_strategy(request.param)
    yield
    mp.set_sharing_strategy(before)


@pytest.mark.usefixtures("strategy")
@pytest.mark.parametrize("method", mp.get_all_start_methods())
def test_objects_arrive_in_processes_that_are_started_with_them(method):
    given = objects()
    # Twice: they are pickled for each process, and stay what they are.
    mp.start_processes(look, given, nprocs=2, start_method=method)
    look(0, *given)
