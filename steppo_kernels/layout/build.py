"""How layouts are built: from masks, from step ids, from rows that are steps, from markers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks, csr
from ..backends.choice import resolve
from . import integers, segment
from .markers import Markers
from .regroup import with_rewards_of_rows
from .rows import in_time_order, row_offsets, uniform_offsets
from .step_tensors import StepTensors


def from_mask(
    mask: Tensor,
    cu_seqlens: Tensor | None,
    boundaries: Tensor | None,
    steps_per_row: Tensor | Sequence[int] | None,
    backend: str,
) -> StepTensors:
    """See `StepLayout.from_mask`."""
    flags = checks.flags("mask", mask, (1, 2), any_byte=True)
    chosen = resolve(backend, flags.device)
    if chosen == "reference":
        flags = checks.ones_of(flags)
    rows = row_offsets("mask", flags, cu_seqlens)
    if boundaries is not None:
        boundaries = checks.flags("boundaries", boundaries, (1, 2), flags.device)
        boundaries = checks.same_shape("boundaries", boundaries, flags.shape)
        boundaries = boundaries.contiguous()
    made = _from_runs(
        flags if flags.is_contiguous() else flags.contiguous(), boundaries, rows, chosen
    )
    if steps_per_row is not None:
        _check_counts(steps_per_row, made.trajectory_offsets.diff())
    return made


def _check_counts(steps_per_row: Tensor | Sequence[int], found: Tensor) -> None:
    """Raise where a row has another number of runs than it has steps."""
    wanted = integers.vector("steps_per_row", steps_per_row).to(found.device)
    checks.same_shape("steps_per_row", wanted, found.shape)
    wrong = (wanted != found).nonzero()
    if len(wrong):
        row = int(wrong[0])
        has, expected = int(found[row]), int(wanted[row])
        why = (
            "steps that touch are one run: mark where the later ones begin in boundaries, or use "
            "from_step_ids or from_markers"
            if has < expected
            else "a step with a hole is several runs: use from_step_ids"
        )
        raise ValueError(
            f"mask: got {has} runs of ones in row {row}, expected {expected} as steps_per_row "
            f"says; {why}"
        )


def from_step_ids(step_ids: Tensor, cu_seqlens: Tensor | None, backend: str) -> StepTensors:
    """See `StepLayout.from_step_ids`."""
    ids = checks.dims("step_ids", checks.integer("step_ids", step_ids), (1, 2))
    rows = row_offsets("step_ids", ids, cu_seqlens)
    if ids.numel() and int(ids.min()) < -1:
        raise ValueError(f"step_ids: got {int(ids.min())}, expected ids >= 0, or -1 for none")
    chosen = resolve(backend, ids.device)
    found = segment.segment_ids(ids.reshape(-1).to(torch.int64).contiguous(), rows, chosen)
    return _from_segments(found, rows, ids.shape, chosen)


def from_rows(
    mask: Tensor,
    trajectory_ids: Tensor | Sequence[Any],
    step_indices: Tensor | Sequence[int],
    valid: Tensor | None,
    backend: str,
) -> StepTensors:
    """See `StepLayout.from_rows`."""
    flags = checks.flags("mask", mask, (2,))
    num_rows, row_length = flags.shape
    device = flags.device
    if valid is not None:
        valid = checks.flags("valid", valid, (1,), device)
        valid = checks.same_shape("valid", valid, torch.Size((num_rows,))).contiguous()
    chosen = resolve(backend, device)
    found = segment.segment_rows(flags.contiguous(), valid, chosen)
    every = torch.arange(num_rows, device="cpu")
    is_real = every if valid is None else valid.cpu().nonzero().squeeze(1)
    steps, offsets = in_time_order(trajectory_ids, step_indices, is_real, num_rows)
    rows = torch.arange(num_rows, device=device)
    index, begins, lengths, starts = segment.compact(
        found.step_ids, num_rows, int(found.counts[0]), chosen
    )
    steps, offsets = steps.to(device), offsets.to(device)
    made = StepTensors(
        step_ids=found.step_ids.view(flags.shape),
        token_index=index,
        step_offsets=begins,
        step_lengths=lengths,
        step_starts=starts,
        trajectory_steps=steps,
        trajectory_offsets=offsets,
        trajectory_counts=csr.count_nonempty(lengths, steps, offsets, num_rows),
        state_index=rows * row_length,
        step_rows=rows,
        row_offsets=uniform_offsets(num_rows, row_length, device),
    )
    return with_rewards_of_rows(made)


def from_markers(
    token_ids: Tensor,
    start: Any,
    end: Any,
    stop: Any,
    valid: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> StepTensors:
    """See `StepLayout.from_markers`."""
    ids = checks.dims("token_ids", checks.integer("token_ids", token_ids), (1, 2))
    rows = row_offsets("token_ids", ids, cu_seqlens)
    markers = Markers.of(start, end, stop, ids.device)
    if valid is not None:
        valid = checks.flags("valid", valid, (1, 2), ids.device)
        valid = checks.same_shape("valid", valid, ids.shape).reshape(-1)
    chosen = resolve(backend, ids.device)
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    if valid is None:
        marked = segment.mark_actions(flat, rows, *markers, chosen)
        return _from_runs(marked.view(ids.shape), None, rows, chosen)
    # Padding is taken out: then it is no part of an action or of a marker, wherever it lies.
    places = valid.nonzero().squeeze(1)
    real_rows = csr.prefix(valid.to(torch.int64))[rows]
    marked = segment.mark_actions(flat[places], real_rows, *markers, chosen)
    found = segment.segment_mask(marked, None, real_rows, chosen)
    step_ids = torch.full((ids.numel(),), -1, dtype=torch.int32, device=ids.device)
    step_ids[places] = found.step_ids
    return _from_segments(found._replace(step_ids=step_ids), rows, ids.shape, chosen)


def _from_runs(mask: Tensor, boundaries: Tensor | None, rows: Tensor, backend: str) -> StepTensors:
    """Make the runs of ones of a contiguous mask the steps, and rows the trajectories."""
    row_steps, counts = segment.count_steps(mask, boundaries, rows, backend)
    num_tokens, _, num_steps = counts.tolist()
    step_ids, index, offsets, lengths, starts, steps, sizes, step_rows = segment.lay_out_runs(
        mask, boundaries, rows, row_steps, num_steps, num_tokens, backend
    )
    return StepTensors(
        step_ids=step_ids,
        token_index=index,
        step_offsets=offsets,
        step_lengths=lengths,
        step_starts=starts,
        trajectory_steps=steps,
        trajectory_offsets=row_steps,
        trajectory_counts=sizes,
        state_index=starts,
        step_rows=step_rows,
        row_offsets=rows,
        along_rows=True,
    )


def _from_segments(
    found: segment.Segments, rows: Tensor, shape: torch.Size, backend: str
) -> StepTensors:
    """Finish a layout whose trajectories are its rows."""
    # One copy to the host brings both sizes and the error.
    num_tokens, decreasing, num_steps = found.counts.tolist()
    if decreasing >= 0:
        raise ValueError(
            f"step_ids: got an id at flat position {decreasing} smaller than one before it in "
            "its row, expected ids that do not decrease along a row"
        )
    index, offsets, lengths, starts = segment.compact(
        found.step_ids, num_steps, num_tokens, backend
    )
    steps, counts, states, step_rows = segment.row_trajectories(
        found.row_steps, index, offsets, backend
    )
    return StepTensors(
        step_ids=found.step_ids.view(shape),
        token_index=index,
        step_offsets=offsets,
        step_lengths=lengths,
        step_starts=starts,
        trajectory_steps=steps,
        trajectory_offsets=found.row_steps,
        trajectory_counts=counts,
        state_index=states,
        step_rows=step_rows,
        row_offsets=rows,
        along_rows=True,
    )
