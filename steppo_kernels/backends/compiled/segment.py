"""Step segmentation in compiled code: see `steppo_kernels.layout.segment` for the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Native, addresses, empty


def segment_mask(
    native: Native, mask: Tensor, boundaries: Tensor | None, row_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Number the runs of ones of each row."""
    num_tokens, num_rows = mask.numel(), row_offsets.numel() - 1
    step_ids, row_steps, counts = _segments(mask, num_tokens, num_rows)
    native.kernels.segment_mask(
        (*addresses(mask, boundaries, row_offsets), num_tokens, num_rows),
        (*addresses(step_ids, row_steps, counts),),
        native.place(mask),
    )
    return step_ids, row_steps, counts


def count_steps(
    native: Native, mask: Tensor, boundaries: Tensor | None, row_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Count the runs of ones of each row."""
    num_tokens, num_rows = mask.numel(), row_offsets.numel() - 1
    row_steps, counts = empty(mask, num_rows + 1, torch.int64), empty(mask, 3, torch.int64)
    native.kernels.count_steps(
        (*addresses(mask, boundaries, row_offsets), num_tokens, num_rows),
        (*addresses(row_steps, counts),),
        native.place(mask),
    )
    return row_steps, counts


def lay_out_runs(
    native: Native,
    mask: Tensor,
    boundaries: Tensor | None,
    row_offsets: Tensor,
    row_steps: Tensor,
    num_steps: int,
    num_actions: int,
) -> tuple[Tensor, ...]:
    """Return the layout of runs that have been counted, in one pass that writes all of it."""
    num_tokens, num_rows = mask.numel(), row_offsets.numel() - 1
    step_ids = empty(mask, mask.shape, torch.int32)
    token_index = empty(mask, num_actions, torch.int64)
    step_offsets = empty(mask, num_steps + 1, torch.int64)
    step_lengths, trajectory_counts = _like_steps(mask, num_steps, torch.int32, 2)
    step_starts, trajectory_steps, step_rows = _like_steps(mask, num_steps, torch.int64, 3)
    outputs = (
        step_ids,
        token_index,
        step_offsets,
        step_lengths,
        step_starts,
        trajectory_steps,
        trajectory_counts,
        step_rows,
    )
    native.kernels.lay_out_runs(
        (*addresses(mask, boundaries, row_offsets), num_tokens, num_rows),
        (*addresses(row_steps), num_steps, num_actions, *addresses(*outputs)),
        native.place(mask),
    )
    return outputs


def segment_ids(native: Native, ids: Tensor, row_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number the distinct (row, id) pairs with id >= 0."""
    num_tokens, num_rows = ids.numel(), row_offsets.numel() - 1
    step_ids, row_steps, counts = _segments(ids, num_tokens, num_rows)
    native.kernels.segment_ids(
        (*addresses(ids, row_offsets), num_tokens, num_rows),
        (*addresses(step_ids, row_steps, counts),),
        native.place(ids),
    )
    return step_ids, row_steps, counts


def segment_rows(
    native: Native, mask: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Make each row a step."""
    num_rows, row_length = mask.shape
    step_ids, row_steps, counts = _segments(mask, mask.numel(), num_rows)
    native.kernels.segment_rows(
        (*addresses(mask, valid), num_rows, row_length),
        (*addresses(step_ids, row_steps, counts),),
        native.place(mask),
    )
    return step_ids, row_steps, counts


def mark_actions(
    native: Native,
    token_ids: Tensor,
    row_offsets: Tensor,
    starts: Tensor,
    start_offsets: Tensor,
    ends: Tensor,
    stops: Tensor,
    stop_offsets: Tensor,
) -> Tensor:
    """Return the mask of tokens in actions: after one of `starts`, up to an end or a stop."""
    mask = empty(token_ids, token_ids.shape, torch.bool)
    num_starts, num_ends = start_offsets.numel() - 1, ends.numel()
    num_stops, num_rows = stop_offsets.numel() - 1, row_offsets.numel() - 1
    markers = (
        *addresses(token_ids, row_offsets, starts, start_offsets),
        num_starts,
        *addresses(ends),
        num_ends,
        *addresses(stops, stop_offsets),
        num_stops,
        num_rows,
        *addresses(mask),
    )
    native.kernels.mark_actions(markers, native.place(token_ids))
    return mask


def compact(
    native: Native, step_ids: Tensor, num_steps: int, num_actions: int
) -> tuple[Tensor, ...]:
    """Return the CSR form of ascending `step_ids`."""
    token_index = empty(step_ids, num_actions, torch.int64)
    step_offsets = empty(step_ids, num_steps + 1, torch.int64)
    step_lengths = empty(step_ids, num_steps, torch.int32)
    step_starts = empty(step_ids, num_steps, torch.int64)
    num_tokens = step_ids.numel()
    compaction = (
        *addresses(step_ids),
        num_tokens,
        num_steps,
        num_actions,
        *addresses(token_index, step_offsets, step_lengths, step_starts),
    )
    native.kernels.compact(compaction, native.place(step_ids))
    return token_index, step_offsets, step_lengths, step_starts


def row_trajectories(
    native: Native, row_steps: Tensor, token_index: Tensor, step_offsets: Tensor
) -> tuple[Tensor, ...]:
    """Make every row a trajectory of its steps, none of which is empty."""
    num_rows, num_steps = row_steps.numel() - 1, step_offsets.numel() - 1
    trajectory_steps, trajectory_counts, state_index, step_rows = (
        empty(row_steps, num_steps, torch.int64),
        empty(row_steps, num_steps, torch.int32),
        empty(row_steps, num_steps, torch.int64),
        empty(row_steps, num_steps, torch.int64),
    )
    trajectories = (
        *addresses(row_steps, token_index, step_offsets),
        num_rows,
        *addresses(trajectory_steps, trajectory_counts, state_index, step_rows),
    )
    native.kernels.row_trajectories(trajectories, native.place(row_steps))
    return trajectory_steps, trajectory_counts, state_index, step_rows


def _like_steps(like: Tensor, num_steps: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    first = empty(like, num_steps, dtype)
    return [first, *(torch.empty_like(first) for _ in range(count - 1))]


def _segments(like: Tensor, num_tokens: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty(like, num_tokens, torch.int32),
        empty(like, num_rows + 1, torch.int64),
        empty(like, 3, torch.int64),
    )
