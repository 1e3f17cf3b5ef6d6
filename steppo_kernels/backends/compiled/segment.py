"""Step segmentation in C++: see `steppo_kernels.layout.segment` for the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import empty, kernels, pointer, threads


def segment_mask(
    mask: Tensor, boundaries: Tensor | None, row_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Number the runs of ones of each row."""
    outputs = _segments(mask.numel(), row_offsets.numel())
    kernels.segment_mask(
        pointer(mask),
        pointer(boundaries),
        pointer(row_offsets),
        mask.numel(),
        row_offsets.numel() - 1,
        *map(pointer, outputs),
        threads(),
    )
    return outputs


def segment_ids(ids: Tensor, row_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number the distinct (row, id) pairs with id >= 0."""
    outputs = _segments(ids.numel(), row_offsets.numel())
    kernels.segment_ids(
        pointer(ids),
        pointer(row_offsets),
        ids.numel(),
        row_offsets.numel() - 1,
        *map(pointer, outputs),
        threads(),
    )
    return outputs


def segment_rows(mask: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Make each row a step."""
    num_rows, row_length = mask.shape
    outputs = _segments(mask.numel(), num_rows + 1)
    kernels.segment_rows(
        pointer(mask), pointer(valid), num_rows, row_length, *map(pointer, outputs), threads()
    )
    return outputs


def mark_actions(
    token_ids: Tensor,
    row_offsets: Tensor,
    starts: Tensor,
    start_offsets: Tensor,
    ends: Tensor,
    stops: Tensor,
    stop_offsets: Tensor,
) -> Tensor:
    """Return the mask of tokens in actions: after one of `starts`, up to an end or a stop."""
    mask = empty(token_ids.shape, torch.bool)
    kernels.mark_actions(
        pointer(token_ids),
        pointer(row_offsets),
        pointer(starts),
        pointer(start_offsets),
        start_offsets.numel() - 1,
        pointer(ends),
        ends.numel(),
        pointer(stops),
        pointer(stop_offsets),
        stop_offsets.numel() - 1,
        row_offsets.numel() - 1,
        pointer(mask),
        threads(),
    )
    return mask


def compact(step_ids: Tensor, num_steps: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the CSR form of ascending `step_ids`."""
    outputs = (
        empty(num_tokens, torch.int64),
        empty(num_steps + 1, torch.int64),
        empty(num_steps, torch.int32),
    )
    kernels.compact(
        pointer(step_ids),
        step_ids.numel(),
        num_steps,
        num_tokens,
        *map(pointer, outputs),
        threads(),
    )
    return outputs


def _segments(num_tokens: int, num_offsets: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty(num_tokens, torch.int32),
        empty(num_offsets, torch.int64),
        empty(2, torch.int64),
    )
