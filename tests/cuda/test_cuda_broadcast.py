"""The CUDA kernels of broadcast_to_tokens and its transpose, on the host."""

from __future__ import annotations

import pytest
import torch

from steppo_kernels import StepLayout
from steppo_kernels.backends import operators
from steppo_kernels.backends.compiled import broadcast
from steppo_kernels.layout.step_layout import require_layout

_SHAPES = [(0,), (1,), (3,), (4,), (1023,), (1025,), (3, 700), (2, 4099)]


def layout_of(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    return require_layout(StepLayout.from_mask(mask, backend="reference"))


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not-aligned"])
def test_steps_to_tokens(cuda, shape, dtype, offset):
    """Copies of numbers, bit by bit, wherever ids begin."""
    layout = layout_of(shape)
    ids = torch.cat((layout.step_ids.new_zeros(offset), layout.step_ids.view(-1)))[offset:]
    per_step = torch.randn(layout.num_steps, dtype=dtype)
    found = broadcast.broadcast_to_tokens(cuda, per_step, ids)
    expected = operators.launcher("reference", "broadcast_to_tokens")(per_step, layout.step_ids)
    assert torch.equal(found, expected.view(-1))


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_of_steps(cuda, shape, dtype):
    layout = layout_of(shape)
    per_token = torch.randn(layout.step_ids.numel(), dtype=dtype)
    given = per_token, layout.token_index, layout.step_offsets
    found, again = (broadcast.sum_over_steps(cuda, *given) for _ in range(2))
    assert torch.equal(found, again)
    exact = operators.launcher("reference", "sum_over_steps")(per_token.double(), *given[1:])
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=64 * torch.finfo(dtype).eps)


def test_a_sum_does_not_depend_on_the_order_of_threads(cuda):
    layout = layout_of((3, 700))
    given = torch.randn(2100), layout.token_index, layout.step_offsets
    found = []
    for seed in range(4):
        cuda.kernels.order(seed, 1 + seed)
        found.append(broadcast.sum_over_steps(cuda, *given))
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_nan_and_an_empty_step_stay_where_they_are(cuda):
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    layout = require_layout(StepLayout.from_rows(mask, [*"aab"], [0, 1, 0], backend="reference"))
    per_token = torch.arange(12.0)
    per_token[1] = torch.nan
    found = broadcast.sum_over_steps(cuda, per_token, layout.token_index, layout.step_offsets)
    assert found[0].isnan()
    assert found[1:].tolist() == [0.0, 38.0]
