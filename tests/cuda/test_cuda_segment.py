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


def rows_of(size, generator):
    """Row offsets with short, long and empty rows."""
    ends = torch.tensor([0, 0, size, size])
    cuts = torch.randint(size + 1, (min(size, 900),), generator=generator)
    return torch.cat((ends, cuts, cuts[:5])).sort().values


def runs_of(size, has_boundaries, kind="drawn"):
    """Return a mask, boundaries or None, and rows."""
    generator = draw(size)
    cuts = torch.rand(size, generator=generator) < 0.05
    mask = cuts.cumsum(0) % 2 == 1
    if kind != "drawn":
        mask = torch.full_like(mask, kind == "ones")
    bounds = torch.rand(size, generator=generator) < 0.1 if has_boundaries else None
    return mask, bounds, rows_of(size, generator)


_RUNS = pytest.mark.parametrize("has_boundaries", [False, True], ids=["runs", "boundaries"])


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not-aligned"])
@pytest.mark.parametrize("size", _SIZES)
@_RUNS
def test_runs_of_a_mask(cuda, size, has_boundaries, offset):
    runs = runs_of(size, has_boundaries)
    same(cuda, "segment_mask", *runs, offset=offset)
    row_steps, counts = same(cuda, "count_steps", *runs, offset=offset)
    sizes = int(counts[2]), int(counts[0])
    found = same(cuda, "lay_out_runs", *runs, row_steps, *sizes, offset=offset)
    same(cuda, "row_trajectories", row_steps, *found[1:3], offset=offset)


@pytest.mark.parametrize("kind", ["ones", "zeros"])
@pytest.mark.parametrize("size", [1, 4096, 9000])
@_RUNS
def test_runs_that_are_all_or_none(cuda, size, kind, has_boundaries):
    mask, bounds, rows = runs_of(size, has_boundaries, kind)
    for given in (rows, torch.tensor([0, size])):
        row_steps, counts = same(cuda, "count_steps", mask, bounds, given)
        sizes = int(counts[2]), int(counts[0])
        same(cuda, "lay_out_runs", mask, bounds, given, row_steps, *sizes)


def test_bytes_of_a_mask_that_are_not_0_are_ones(cuda):
    mask = torch.randint(0, 256, (5000,), dtype=torch.uint8, generator=draw(1))
    mask[torch.rand(5000, generator=draw(2)) < 0.5] = 0
    rows = torch.tensor([0, 17, 5000])
    found = segment.segment_mask(cuda, mask.view(torch.bool), None, rows)
    expected = operators.launcher("reference", "segment_mask")(mask != 0, None, rows)
    assert all(map(torch.equal, found, expected))


def test_no_rows(cuda):
    none = torch.zeros(0, dtype=torch.bool)
    same(cuda, "count_steps", none, None, torch.zeros(1, dtype=torch.int64))
