"""The CUDA kernel that orders rows with a gradient, on the host, in any order of threads."""

from __future__ import annotations

import pytest
import torch

from steppo_kernels.backends import operators
from steppo_kernels.backends.compiled import live_rows

# A block takes 4096 rows at once.
_SIZES = [0, 1, 5, 4095, 4096, 4097, 9000]


def drawn(size, share, dtype=torch.float32):
    generator = torch.Generator().manual_seed(size)
    is_live = torch.rand(size, generator=generator) < share
    return torch.randn(size, generator=generator, dtype=dtype) * is_live


@pytest.mark.parametrize("size", _SIZES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_order_is_that_of_the_reference(cuda, size, share, dtype):
    grads = drawn(size, share, dtype), drawn(size + 1, share / 4, dtype)[1:]
    for grad_entropy in (None, grads[1].contiguous()):
        for ascending in (False, True):
            given = grads[0], grad_entropy, ascending
            found = live_rows.order_live_rows(cuda, *given)
            expected = operators.launcher("reference", "order_live_rows")(*given)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_live_rows_of_a_later_tile_take_places_in_an_earlier_one(cuda):
    """Every row of the second half is live, so that all of them move."""
    size = 10_000
    grad = (torch.arange(size) >= size // 2).float()
    order, count = live_rows.order_live_rows(cuda, grad, None, False)
    assert int(count) == size // 2
    assert torch.equal(order[: size // 2], torch.arange(size // 2, size))
    assert torch.equal(order[size // 2 :], torch.arange(size // 2))
