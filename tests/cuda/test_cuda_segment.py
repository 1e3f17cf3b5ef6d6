"""The CUDA kernels of segmentation, on the host: integers, bit by bit those of the reference."""

from __future__ import annotations

import pytest
import torch

from steppo_kernels.backends import operators
from steppo_kernels.backends.compiled import segment

# Tokens of a batch: none, one, odd numbers, around what a block takes at once, and many.
_SIZES = [0, 1, 3, 255, 1024, 4095, 4097, 20011]


def draw(seed):
    return torch.Generator().manual_seed(seed)


def shifted(values, offset):
    """The same values, `offset` elements behind where an allocation begins."""
    if values is None:
        return None
    moved = values.new_empty(values.numel() + offset)[offset:].view(values.shape)
    return moved.copy_(values)


def same(cuda, name, *given, offset=0):
    """Run a launcher on shifted inputs; require what the reference gives, twice."""
    expected = operators.launcher("reference", name)(*given)
    moved = [shifted(one, offset) if isinstance(one, torch.Tensor) else one for one in given]
    for _ in range(2):
        found = getattr(segment, name)(cuda, *moved)
        pairs = [(found, expected)] if torch.is_tensor(found) else zip(found, expected, strict=True)
        for one, wanted in pairs:
            assert one.dtype == wanted.dtype
            assert torch.equal(one, wanted)
    return expected


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not-aligned"])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (7, 3), (3, 1365), (5, 1024), (1025, 9)])
@pytest.mark.parametrize("has_valid", [False, True], ids=["all", "valid"])
def test_rows_as_steps(cuda, shape, has_valid, offset):
    mask = torch.rand(shape, generator=draw(1)) < 0.6
    valid = torch.rand(shape[0], generator=draw(2)) < 0.7 if has_valid else None
    same(cuda, "segment_rows", mask, valid, offset=offset)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not-aligned"])
@pytest.mark.parametrize("size", _SIZES)
@pytest.mark.parametrize("jump", [1, 40])
def test_csr_of_ids(cuda, size, jump, offset):
    """With and without steps that are empty, in front, between and behind."""
    grows = torch.rand(size, generator=draw(size)) < 0.05
    ids = (grows * torch.randint(1, jump + 1, (size,), generator=draw(3))).cumsum(0) + jump // 2
    ids[torch.rand(size, generator=draw(4)) < 0.3] = -1
    num_steps = int(ids.max()) + jump if size else jump
    num_actions = int((ids >= 0).sum())
    same(cuda, "compact", ids.to(torch.int32), num_steps, num_actions, offset=offset)


def test_csr_of_no_action(cuda):
    same(cuda, "compact", torch.full((5000,), -1, dtype=torch.int32), 3000, 0)
    same(cuda, "compact", torch.full((7,), -1, dtype=torch.int32), 0, 0)
