"""The segmentation operators at sizes where kernels work in blocks, against the reference."""

from __future__ import annotations

import pytest
import torch
from batches import ragged_mask
from grids import grid

from steppo_kernels import StepLayout
from steppo_kernels.layout import segment
from steppo_kernels.layout.markers import Markers

pytestmark = pytest.mark.isa

# One row, many rows, rows of one token, and rows longer than any block of a kernel.
_SHAPES = [(1, 1), (5, 7), (3, 2049), (1, 5000), (97, 31), (3000, 1)]
_NO_TOKENS = [(0, 4), (4, 0)]


# The interpreter takes minutes for the others; `test_rows_longer_than_a_block` has its blocks.
_FEW = {"shape": [(1, 1), (5, 7)]}


def uneven_rows(numel: int, generator: torch.Generator) -> torch.Tensor:
    """Row offsets with short, long and empty rows."""
    cuts = torch.randint(numel + 1, (17,), generator=generator)
    return torch.cat((torch.tensor([0, 0, numel]), cuts, cuts[:3])).sort().values


def assert_equal(found, expected, target):
    for name, value, wanted in zip(segment.Segments._fields, found, expected, strict=True):
        assert value.dtype == wanted.dtype, name
        assert value.device.type == target.device
        assert torch.equal(value.cpu(), wanted), name


@grid(interpreted=_FEW, shape=_SHAPES, with_boundaries={"runs": False, "boundaries": True})
def test_segment_mask(target, shape, with_boundaries):
    generator = torch.Generator().manual_seed(shape[1])
    mask = ragged_mask(*shape, mean_step=40, generator=generator).reshape(-1)
    rows = uneven_rows(mask.numel(), generator)
    opens = torch.rand(mask.shape, generator=generator) < 0.1 if with_boundaries else None
    on_device = [None if t is None else t.to(target.device) for t in (mask, opens, rows)]
    found = segment.segment_mask(*on_device, target.backend)
    assert_equal(found, segment.segment_mask(mask, opens, rows, "reference"), target)


@pytest.mark.parametrize("threads", [1, 3])
@grid(
    cover=1,
    interpreted={"shape": [(5, 7), (0, 4)]},
    shape=[*_SHAPES, *_NO_TOKENS],
    with_boundaries={"runs": False, "boundaries": True},
)
def test_runs_that_are_laid_out_in_one_pass(
    target, shape, with_boundaries, threads, threads_restored
):
    """It finds what the parts find one after another, whatever the threads share a row."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(shape[1])
    mask = ragged_mask(*shape, mean_step=40, generator=generator).reshape(-1)
    rows = uneven_rows(mask.numel(), generator)
    opens = torch.rand(mask.shape, generator=generator) < 0.1 if with_boundaries else None
    whole = segment.segment_mask(mask, opens, rows, "reference")
    num_steps, num_tokens = int(whole.row_steps[-1]), int(whole.counts[0])
    csr = segment.compact(whole.step_ids, num_steps, num_tokens, "reference")
    trajectories = segment.row_trajectories(whole.row_steps, csr[0], csr[1], "reference")
    runs = [None if t is None else t.to(target.device) for t in (mask, opens, rows)]
    row_steps, counts = segment.count_steps(*runs, target.backend)
    assert torch.equal(row_steps.cpu(), whole.row_steps)
    assert torch.equal(counts.cpu(), whole.counts)
    found = segment.lay_out_runs(*runs, row_steps, num_steps, num_tokens, target.backend)
    steps, counts, states, step_rows = trajectories
    assert torch.equal(states, csr[3])
    made = [whole.step_ids, *csr, steps, counts, step_rows]
    for value, wanted in zip(found, made, strict=True):
        assert value.dtype == wanted.dtype
        assert torch.equal(value.cpu(), wanted)
    # The same of its parts.
    moved = [value.to(target.device) for value in (whole.row_steps, csr[0], csr[1])]
    for value, wanted in zip(
        segment.row_trajectories(*moved, target.backend), trajectories, strict=True
    ):
        assert value.dtype == wanted.dtype
        assert torch.equal(value.cpu(), wanted)


@grid(interpreted=_FEW, shape=_SHAPES, ordered={"ordered": True, "decreasing": False})
def test_segment_ids(target, shape, ordered):
    generator = torch.Generator().manual_seed(shape[1])
    numel = shape[0] * shape[1]
    rows = uneven_rows(numel, generator)
    action = torch.rand(numel, generator=generator) < 0.7
    ids = torch.where(action, torch.arange(numel) // 3, -1)
    if not ordered and numel > 1:
        ids[numel // 2 :: 7] = 0
    found = segment.segment_ids(ids.to(target.device), rows.to(target.device), target.backend)
    expected = segment.segment_ids(ids, rows, "reference")
    if expected.counts[1] >= 0:
        # The error names the place of the first id that decreases: only that is used.
        assert found.counts[1].item() == expected.counts[1].item()
    else:
        assert_equal(found, expected, target)


@grid(
    interpreted={"shape": [*_FEW["shape"], *_NO_TOKENS]},
    shape=[*_SHAPES, *_NO_TOKENS],
    padded={"all-valid": False, "padded": True},
)
def test_segment_rows(target, shape, padded):
    generator = torch.Generator().manual_seed(shape[1])
    mask = torch.rand(shape, generator=generator) < 0.6
    valid = torch.rand(shape[0], generator=generator) < 0.7 if padded else None
    found = segment.segment_rows(
        mask.to(target.device), None if valid is None else valid.to(target.device), target.backend
    )
    assert_equal(found, segment.segment_rows(mask, valid, "reference"), target)


@grid(interpreted=_FEW, shape=_SHAPES, start=[[1], [1, 2], [0, 1, 0]])
def test_mark_actions(target, shape, start):
    generator = torch.Generator().manual_seed(shape[1])
    ids = torch.randint(6, (shape[0] * shape[1],), generator=generator)
    rows = uneven_rows(ids.numel(), generator)
    markers = Markers.of(start, 5, None, ids.device)
    arguments = [value.to(target.device) for value in (ids, rows, *markers)]
    found = segment.mark_actions(*arguments, target.backend)
    assert torch.equal(found.cpu(), segment.mark_actions(ids, rows, *markers, "reference"))


@grid(interpreted=_FEW, shape=_SHAPES)
def test_compact(target, shape):
    generator = torch.Generator().manual_seed(shape[1])
    mask = ragged_mask(*shape, mean_step=40, generator=generator).reshape(-1)
    rows = torch.arange(shape[0] + 1) * shape[1]
    found = segment.segment_mask(mask, None, rows, "reference")
    # Two steps more than there are ids: empty ones at the end.
    sizes = int(found.row_steps[-1]) + 2, int(found.counts[0])
    expected = segment.compact(found.step_ids, *sizes, "reference")
    got = segment.compact(found.step_ids.to(target.device), *sizes, target.backend)
    for value, wanted in zip(got, expected, strict=True):
        assert value.dtype == wanted.dtype
        assert torch.equal(value.cpu(), wanted)


@pytest.mark.parametrize("length", [33, 50])
def test_rows_longer_than_a_block(kernel, length):
    """Each block hands a row's open step and its largest id on to the next."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, 6, (2, length), generator=generator)
    # A step whose tokens lie in three blocks, and ids that grow across their borders.
    ids = torch.where(tokens == 0, -1, torch.arange(length) // 20 * 3)

    def by_markers(values, backend):
        return StepLayout.from_markers(values, [1], 2, backend=backend)

    made = {
        "ids": (StepLayout.from_step_ids, ids),
        "markers": (by_markers, tokens),
        "mask": (StepLayout.from_mask, tokens > 2),
    }
    for name, (build, values) in made.items():
        found = build(values.to(kernel.device), backend=kernel.backend)
        wanted = build(values, backend="reference")
        assert wanted.num_steps > 1, name
        for field, value in wanted.tensors().items():
            assert torch.equal(found.tensors()[field].cpu(), value), (name, field)
