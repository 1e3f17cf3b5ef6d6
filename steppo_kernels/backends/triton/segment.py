"""Step segmentation: see `steppo_kernels.layout.segment` for the contract.

Two walks over the rows, one that counts and one that numbers; between them a running sum over rows
(or blocks) makes first numbers of counts. All of it is integer arithmetic.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import aligned, all_registers, cdiv, device_guard, programs, row_block, threads
from .step_arrays import compact, row_trajectories
from .tiles import chunk, running_max

# `operators.launcher` looks for all of them here.
__all__ = [
    "compact",
    "count_steps",
    "lay_out_runs",
    "mark_actions",
    "row_trajectories",
    "segment_ids",
    "segment_mask",
    "segment_rows",
]

_LENGTHS = ["num_rows", "row_length", "num_tokens", "num_starts", "num_ends", "num_stops"]
_NONE = tl.constexpr(2**63 - 1)


@triton.jit
def _walk_row(
    p_mask,
    p_boundaries,
    p_ids,
    p_step_ids,
    i_begin,
    length,
    first_step,
    ALIGNED: tl.constexpr,
    BT: tl.constexpr,
):
    """Number the steps of a row from `first_step`, storing them if `p_step_ids` is given.

    A step begins at the first token of a run or at a boundary (masks), or at an id larger than all
    before it (ids). Returns the number of steps and of action tokens, and the first position with
    an id smaller than one before it.
    """
    steps = tl.full((), 0, tl.int64)
    tokens = tl.full((), 0, tl.int64)
    decreasing = tl.full((), _NONE, tl.int64)
    largest = tl.full((), -1, tl.int64)
    for t in range(0, length, BT):
        i_flat, b_lane, m_row = chunk(i_begin, t, length, ALIGNED, BT)
        m_before = m_row & (t + b_lane > 0)
        if p_ids is not None:
            b_id = tl.load(p_ids + i_flat + b_lane, mask=m_row, other=-1)
            b_before = tl.load(p_ids + i_flat - 1 + b_lane, mask=m_before, other=-1)
            b_before = tl.maximum(running_max(b_before), largest)
            m_action = b_id >= 0
            m_first = m_action & (b_id > b_before)
            m_wrong = m_action & (b_id < b_before)
            b_wrong = tl.where(m_wrong, i_flat + b_lane, _NONE)
            decreasing = tl.minimum(decreasing, tl.min(b_wrong, 0))
            largest = tl.max(tl.maximum(b_before, b_id), 0)
        else:
            m_action = tl.load(p_mask + i_flat + b_lane, mask=m_row, other=0) != 0
            b_before = tl.load(p_mask + i_flat - 1 + b_lane, mask=m_before, other=0)
            m_first = m_action & (b_before == 0)
            if p_boundaries is not None:
                b_boundary = tl.load(p_boundaries + i_flat + b_lane, mask=m_row, other=0)
                m_first = m_action & ((b_before == 0) | (b_boundary != 0))
        if p_step_ids is not None:
            b_number = first_step + steps + tl.cumsum(m_first.to(tl.int32), 0) - 1
            b_number = tl.where(m_action, b_number, -1).to(tl.int32)
            tl.store(p_step_ids + i_flat + b_lane, b_number, mask=m_row)
        steps += tl.sum(m_first.to(tl.int32), 0)
        tokens += tl.sum(m_action.to(tl.int32), 0)
    return steps, tokens, decreasing


@triton.jit(do_not_specialize=_LENGTHS)
def segment_kernel(
    p_mask,
    p_boundaries,
    p_ids,
    p_row_offsets,
    p_row_steps,
    p_step_ids,
    p_steps,
    p_tokens,
    p_decreasing,
    num_rows,
    BT: tl.constexpr,
):
    """Count steps by row, or number them where `p_step_ids` is given."""
    for i_row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        i_begin = tl.load(p_row_offsets + i_row)
        length = tl.load(p_row_offsets + i_row + 1) - i_begin
        first_step = tl.full((), 0, tl.int64)
        if p_step_ids is not None:
            first_step = tl.load(p_row_steps + i_row)
        # Rows that begin and end at multiples of 16 take wide loads.
        if (i_begin % 16 == 0) & (length % 16 == 0):
            steps, tokens, decreasing = _walk_row(
                p_mask, p_boundaries, p_ids, p_step_ids, i_begin, length, first_step, True, BT
            )
        else:
            steps, tokens, decreasing = _walk_row(
                p_mask, p_boundaries, p_ids, p_step_ids, i_begin, length, first_step, False, BT
            )
        if p_step_ids is None:
            tl.store(p_steps + i_row, steps)
            tl.store(p_tokens + i_row, tokens)
            tl.store(p_decreasing + i_row, decreasing)


@triton.jit(do_not_specialize=_LENGTHS)
def segment_rows_kernel(
    p_mask,
    p_valid,
    p_step_ids,
    p_tokens,
    num_rows,
    row_length,
    ALIGNED: tl.constexpr,
    BT: tl.constexpr,
):
    """Write the row's number at its action tokens."""
    length = row_length.to(tl.int64)
    for i_row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        i_begin = i_row * length
        if ALIGNED:
            i_begin = tl.multiple_of(i_begin, 16)
        tokens = tl.full((), 0, tl.int64)
        valid = tl.full((), 1, tl.uint8)
        if p_valid is not None:
            valid = tl.load(p_valid + i_row)
        for t in range(0, length, BT):
            i_flat, b_lane, m_row = chunk(i_begin, t, length, ALIGNED, BT)
            b_action = tl.load(p_mask + i_flat + b_lane, mask=m_row, other=0) & valid
            b_number = tl.where(b_action != 0, i_row, -1).to(tl.int32)
            tl.store(p_step_ids + i_flat + b_lane, b_number, mask=m_row)
            tokens += tl.sum((b_action != 0).to(tl.int32), 0)
        tl.store(p_tokens + i_row, tokens)


@triton.jit
def _stands(p_ids, p_sequences, i_sequence, length, b_at, i_end, m_lane):
    """Return the lanes of `m_lane` with a sequence that begins at `b_at` and ends by `i_end`."""
    m_match = m_lane & (b_at + length <= i_end)
    for k in range(length):
        b_id = tl.load(p_ids + b_at + k, mask=m_match, other=0)
        m_match = m_match & (b_id == tl.load(p_sequences + i_sequence + k))
    return m_match


@triton.jit(do_not_specialize=_LENGTHS)
def mark_actions_kernel(
    p_ids,
    p_row_offsets,
    p_starts,
    p_start_offsets,
    p_ends,
    p_stops,
    p_stop_offsets,
    p_mask,
    num_rows,
    num_starts,
    num_ends,
    num_stops,
    BT: tl.constexpr,
):
    """Mark a token if the last event up to it in its row opens an action."""
    for i_row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        i_begin = tl.load(p_row_offsets + i_row)
        i_end = tl.load(p_row_offsets + i_row + 1)
        is_open = tl.full((), 0, tl.int32)
        for t in range(i_begin, i_end, BT):
            b_lane = tl.arange(0, BT)
            b_pos = t + b_lane
            m_row = b_pos < i_end
            m_before = m_row & (b_pos > i_begin)
            b_before = tl.load(p_ids + b_pos - 1, mask=m_before, other=0)
            m_closes = b_pos < i_begin
            for k in range(num_ends):
                m_closes = m_closes | (m_before & (b_before == tl.load(p_ends + k)))
            m_opens = b_pos < i_begin
            for k in range(num_starts):
                i_first = tl.load(p_start_offsets + k)
                length = tl.load(p_start_offsets + k + 1) - i_first
                b_at = b_pos - length
                m_inside = m_before & (b_at >= i_begin)
                m_start = _stands(p_ids, p_starts, i_first, length, b_at, i_end, m_inside)
                # Only the longest of the sequences that begin at one token counts.
                m_shorter = b_pos < i_begin
                for other in range(num_starts):
                    i_other = tl.load(p_start_offsets + other)
                    longer = tl.load(p_start_offsets + other + 1) - i_other
                    m_longer = m_start & (b_pos - longer < b_at)
                    m_shorter = m_shorter | _stands(
                        p_ids, p_starts, i_other, longer, b_at, i_end, m_longer
                    )
                m_opens = m_opens | (m_start & ~m_shorter)
            m_stops = b_pos < i_begin
            for k in range(num_stops):
                i_first = tl.load(p_stop_offsets + k)
                length = tl.load(p_stop_offsets + k + 1) - i_first
                m_stops = m_stops | _stands(p_ids, p_stops, i_first, length, b_pos, i_end, m_row)
            b_event = tl.where(m_closes | m_stops, 2 * b_lane + 2, 0)
            b_event = tl.where(m_opens & ~m_stops, 2 * b_lane + 3, b_event)
            b_event = tl.maximum(running_max(b_event), is_open)
            tl.store(p_mask + b_pos, (b_event & 1).to(tl.uint8), mask=m_row)
            is_open = tl.max(b_event, 0) & 1


def segment_mask(
    mask: Tensor, boundaries: Tensor | None, row_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Number the runs of ones of each row."""
    bounds = None if boundaries is None else boundaries.view(torch.uint8)
    return _segment(mask.view(torch.uint8), bounds, None, row_offsets)


def segment_ids(ids: Tensor, row_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number the distinct (row, id) pairs with id >= 0."""
    return _segment(None, None, ids, row_offsets)


def count_steps(
    mask: Tensor, boundaries: Tensor | None, row_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Count the runs of ones of each row."""
    return _count(*_bytes(mask, boundaries), None, row_offsets)


def lay_out_runs(
    mask: Tensor,
    boundaries: Tensor | None,
    row_offsets: Tensor,
    row_steps: Tensor,
    num_steps: int,
    num_actions: int,
) -> tuple[Tensor, ...]:
    """Return the layout of runs that have been counted."""
    step_ids = _number(*_bytes(mask, boundaries), None, row_offsets, row_steps)
    csr = compact(step_ids, num_steps, num_actions)
    steps, counts, _, rows = row_trajectories(row_steps, csr[0], csr[1])
    return step_ids.view(mask.shape), *csr, steps, counts, rows


def _bytes(mask: Tensor, boundaries: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return mask.view(torch.uint8), None if boundaries is None else boundaries.view(torch.uint8)


def _segment(
    mask: Tensor | None, boundaries: Tensor | None, ids: Tensor | None, row_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    row_steps, counts = _count(mask, boundaries, ids, row_offsets)
    return _number(mask, boundaries, ids, row_offsets, row_steps), row_steps, counts


def _count(
    mask: Tensor | None, boundaries: Tensor | None, ids: Tensor | None, row_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the number of steps before each row, and the counts of all."""
    num_rows = row_offsets.numel() - 1
    row_steps = row_offsets.new_zeros((num_rows + 1,))
    counts = row_offsets.new_tensor([0, -1, 0])
    if num_rows:
        by_row = row_offsets.new_empty((3, num_rows))
        _walk(mask, boundaries, ids, row_offsets, row_steps, None, *by_row.unbind())
        torch.cumsum(by_row[0], 0, out=row_steps[1:])
        counts[0] = by_row[1].sum()
        counts[2] = row_steps[-1]
        if ids is not None:
            decreasing = by_row[2].min()
            counts[1] = torch.where(decreasing == _NONE.value, -1, decreasing)
    return row_steps, counts


def _number(
    mask: Tensor | None,
    boundaries: Tensor | None,
    ids: Tensor | None,
    row_offsets: Tensor,
    row_steps: Tensor,
) -> Tensor:
    """Return the step of each token."""
    tokens = mask if ids is None else ids
    assert tokens is not None
    step_ids = row_offsets.new_empty((tokens.numel(),), dtype=torch.int32)
    if row_offsets.numel() > 1:
        _walk(mask, boundaries, ids, row_offsets, row_steps, step_ids, None, None, None)
    return step_ids


def _walk(
    mask: Tensor | None,
    boundaries: Tensor | None,
    ids: Tensor | None,
    row_offsets: Tensor,
    row_steps: Tensor,
    *outputs: Tensor | None,
) -> None:
    """Count by row, or number the tokens if `step_ids` is the first of the outputs."""
    num_rows = row_offsets.numel() - 1
    tokens = mask if ids is None else ids
    assert tokens is not None
    block = row_block(cdiv(tokens.numel(), num_rows))
    with device_guard(tokens):
        segment_kernel[(programs(num_rows),)](
            mask,
            boundaries,
            ids,
            row_offsets,
            row_steps,
            *outputs,
            num_rows,
            BT=block,
            **threads(block, _elements(tokens)),
        )


def segment_rows(mask: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Make each row a step."""
    num_rows, row_length = mask.shape
    step_ids = mask.new_empty((num_rows * row_length,), dtype=torch.int32)
    row_steps = torch.arange(num_rows + 1, device=mask.device)
    tokens = row_steps.new_empty((num_rows,))
    block = row_block(row_length)
    if num_rows:
        with device_guard(mask):
            segment_rows_kernel[(programs(num_rows),)](
                mask.view(torch.uint8),
                None if valid is None else valid.contiguous().view(torch.uint8),
                step_ids,
                tokens,
                num_rows,
                row_length,
                ALIGNED=aligned(row_length),
                BT=block,
                **threads(block, _elements(mask)),
            )
    counts = torch.stack((tokens.sum(), row_steps.new_tensor(-1), row_steps[-1]))
    return step_ids, row_steps, counts


def _elements(tokens: Tensor) -> int:
    """Return how many elements a thread takes at a time: 128 bits of them."""
    return 16 // tokens.element_size()


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
    num_rows = row_offsets.numel() - 1
    mask = token_ids.new_empty(token_ids.shape, dtype=torch.bool)
    if num_rows:
        block = row_block(cdiv(token_ids.numel(), num_rows))
        with device_guard(token_ids):
            mark_actions_kernel[(programs(num_rows),)](
                token_ids,
                row_offsets,
                starts,
                start_offsets,
                ends,
                stops,
                stop_offsets,
                mask.view(torch.uint8),
                num_rows,
                start_offsets.numel() - 1,
                ends.numel(),
                stop_offsets.numel() - 1,
                BT=block,
                **threads(block),
                **all_registers(),
            )
    return mask
