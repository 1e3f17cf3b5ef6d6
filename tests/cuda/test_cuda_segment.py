"""The CUDA kernels of segmentation, on the host: integers, bit by bit those of the reference."""

from __future__ import annotations

import pytest
import torch

from steppo_kernels.backends import operators
from steppo_kernels.backends.compiled import segment

# Tokens of a batch: none, one, odd numbers, around what a block takes at once, and many.
_SIZES = [0, 1, 3, 255, 1024, 4095, 4097, 20011]


# What takes long on the host runs in one order of threads.
_ONCE = pytest.mark.parametrize("cuda", [(5, 1)], ids=["drawn"], indirect=True)


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


def rows_of(size, generator, most=900):
    """Row offsets with short, long and empty rows."""
    ends = torch.tensor([0, 0, size, size])
    cuts = torch.randint(size + 1, (min(size, most),), generator=generator)
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


@_ONCE
@pytest.mark.parametrize("name", ["count_steps", "compact", "segment_rows"])
def test_more_tiles_than_blocks(cuda, name):
    """Blocks take several tiles, and the last one less than the others."""
    size = (1025 << (12 if name == "count_steps" else 10)) + 5
    mask = torch.rand(size, generator=draw(1)) < 0.5
    given = {
        "count_steps": (mask, None, torch.tensor([0, 5, 5, 4096, 70000, size - 1, size, size])),
        "segment_rows": (mask.view(1, -1), None),
    }
    ids = torch.where(mask, torch.arange(size) // 1000, -1).to(torch.int32)
    given["compact"] = ids, int(ids.max()) + 2, int(mask.sum())
    same(cuda, name, *given[name])


def test_no_rows(cuda):
    none = torch.zeros(0, dtype=torch.bool)
    same(cuda, "count_steps", none, None, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not-aligned"])
@pytest.mark.parametrize("size", [0, 1, 3, 255, 1025, 10007])
@pytest.mark.parametrize("ascending", [True, False], ids=["ascending", "any"])
def test_ids(cuda, size, ascending, offset):
    generator = draw(size)
    rows = rows_of(size, generator, most=20)
    if ascending:
        ids = (torch.rand(size, generator=generator) < 0.1).cumsum(0) << 33
        ids[torch.rand(size, generator=generator) < 0.3] = -7
    else:
        ids = torch.randint(-3, 40, (size,), generator=generator)
    for given in (rows, torch.tensor([0, size])):
        same(cuda, "segment_ids", ids, given, offset=offset)


@_ONCE
def test_ids_of_many_rows(cuda):
    """More rows than blocks, and some of the largest numbers there are."""
    rows = torch.arange(1501) * 2
    ids = torch.randint(2**63 - 1, (3000,), generator=draw(1))
    ids[::7] = -(2**63)
    same(cuda, "segment_ids", ids, rows)
    same(cuda, "segment_ids", ids[:0], rows[:1])


def sequences(*parts):
    """Return sequences end to end, and their offsets."""
    ends = torch.tensor([0, *map(len, parts)]).cumsum(0)
    return torch.tensor([token for part in parts for token in part], dtype=torch.int64), ends


@pytest.mark.parametrize("size", [0, 1, 3, 255, 257, 3001])
@pytest.mark.parametrize("number", range(3))
def test_markers(cuda, size, number):
    """Of few tokens, so that sequences overlap, begin together and end at rows."""
    starts = [([1],), ([1, 2], [1], [2, 1, 1]), ([0, 0, 1], [0, 0], [3, 0], [0])][number]
    stops = [(), ([2, 2],), ([1, 0], [1], [2, 3, 2])][number]
    ends = torch.tensor([[], [3], [2, 3]][number], dtype=torch.int64)
    generator = draw(size + number)
    tokens = torch.randint(4, (size,), generator=generator)
    for rows in (rows_of(size, generator, most=20), torch.tensor([0, size])):
        markers = (*sequences(*starts), ends, *sequences(*stops))
        same(cuda, "mark_actions", tokens, rows, *markers)


def test_an_action_may_span_blocks(cuda):
    """Nothing but one opening token, one closing one and long silence."""
    tokens = torch.zeros(4000, dtype=torch.int64)
    tokens[5], tokens[3000] = 1, 2
    markers = (*sequences([1]), torch.tensor([2]), *sequences())
    mask = same(cuda, "mark_actions", tokens, torch.tensor([0, 4000]), *markers)
    assert int(mask.sum()) == 2995
