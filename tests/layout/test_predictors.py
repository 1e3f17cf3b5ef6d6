"""Layouts of padded rows: those that a padded mask gives."""

from __future__ import annotations

import pytest
import torch
from batches import ragged_mask

from steppo_kernels import StepLayout, step_gae
from steppo_kernels.layout.predictors import padded_left, shifted_left


def padded(mask: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(mask, (columns, 0))


def same(found: StepLayout, expected: StepLayout, but: tuple[str, ...] = ()) -> None:
    tensors = expected.tensors()
    assert found.tensors().keys() == tensors.keys()
    for name, value in tensors.items():
        if name not in but:
            assert torch.equal(found.tensors()[name], value), name


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 2), (0, 4)])
def test_masks(shape, columns):
    mask = ragged_mask(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    layout = StepLayout.from_mask(mask, backend="reference")
    expected = StepLayout.from_mask(padded(mask, columns), backend="reference")
    same(padded_left(layout, mask.shape, columns), expected)
    flat = StepLayout.from_mask(
        mask.flatten(), cu_seqlens=torch.arange(shape[0] + 1) * shape[1], backend="reference"
    )
    same(padded_left(flat, mask.shape, columns), expected)


def test_rows_and_their_rewards():
    """An empty step keeps the rewards of its row, and a step its rows in another order."""
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]])
    rows = [0, 0, 0], [2, 1, 0]
    layout = StepLayout.from_rows(mask, *rows, backend="reference")
    moved = padded_left(layout, mask.shape, 2)
    expected = StepLayout.from_rows(padded(mask, 2), *rows, backend="reference")
    # Those of the padding have no place in the layout before.
    same(moved, expected, but=("state_index", "reward_index", "reward_offsets"))
    assert moved.state_index.tolist() == [2, 7, 12]
    rewards = torch.arange(9.0).reshape(3, 3)
    zeros = torch.zeros(3)
    for one, given in ((layout, rewards), (moved, padded(rewards, 2))):
        found = step_gae(given, zeros, one, gamma=1.0, whiten=False, backend="reference")
        assert found.returns.tolist() == [3.0, 15.0, 36.0]
    whole, by_hand = moved.per_trajectory(), expected.per_trajectory()
    same(whole, by_hand, but=("state_index", "reward_index", "reward_offsets"))


def test_packed_rows_within_rows():
    """A row of the batch that holds two packed ones: the padding belongs to the first."""
    mask = torch.tensor([1, 1, 1, 1, 0, 1])
    layout = StepLayout.from_mask(mask, cu_seqlens=torch.tensor([0, 2, 3, 6]), backend="reference")
    moved = padded_left(layout, torch.Size((2, 3)), 2)
    expected = StepLayout.from_mask(
        padded(mask.view(2, 3), 2).flatten(),
        cu_seqlens=torch.tensor([0, 4, 5, 10]),
        backend="reference",
    )
    same(moved, expected, but=("step_ids",))
    assert torch.equal(moved.step_ids.flatten(), expected.step_ids)


def test_padding_and_a_shift():
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    layout = StepLayout.from_mask(mask, backend="reference")
    found = shifted_left(padded_left(layout, mask.shape, 1))
    assert found.step_ids.tolist() == [[0, -1, 1, -1], [2, 2, 2, -1]]
