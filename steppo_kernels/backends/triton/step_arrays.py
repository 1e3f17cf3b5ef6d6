"""The arrays of a layout from the step ids of its tokens: CSR form, and rows as trajectories."""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FLAT_BLOCK, aligned, all_registers, cdiv, device_guard, threads
from .tiles import chunk

_LENGTHS = ["num_tokens", "num_rows", "num_steps", "num_actions"]
_SEARCH_BLOCK = 512


@triton.jit(do_not_specialize=_LENGTHS)
def compact_kernel(
    p_step_ids, p_first, p_index, p_counts, num_tokens, ALIGNED: tl.constexpr, BT: tl.constexpr
):
    """Count the action tokens of a block, or write where they are if `p_index` is given."""
    i_p = tl.program_id(0).to(tl.int64)
    length = num_tokens.to(tl.int64)
    i_flat, b_lane, m_token = chunk(0, i_p * BT, length, ALIGNED, BT)
    b_step = tl.load(p_step_ids + i_flat + b_lane, mask=m_token, other=-1)
    b_action = (b_step >= 0).to(tl.int32)
    if p_index is None:
        tl.store(p_counts + i_p, tl.sum(b_action, 0).to(tl.int64))
    else:
        b_rank = tl.load(p_first + i_p) + tl.cumsum(b_action, 0) - 1
        tl.store(p_index + b_rank, i_flat + b_lane, mask=b_action != 0)


@triton.jit(do_not_specialize=_LENGTHS)
def step_offsets_kernel(
    p_step_ids, p_index, p_offsets, p_lengths, p_starts, num_steps, num_actions, BS: tl.constexpr
):
    """Find the first action token of each step and of the one after it by bisection.

    Positions ascend within a step, so that its ends tell whether they follow each other.
    """
    b_s = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    b_begin = _first_at_least(p_step_ids, p_index, b_s, num_actions, BS)
    b_end = _first_at_least(p_step_ids, p_index, b_s + 1, num_actions, BS)
    tl.store(p_offsets + b_s, b_begin, mask=b_s <= num_steps)
    tl.store(p_lengths + b_s, (b_end - b_begin).to(tl.int32), mask=b_s < num_steps)
    m_step = b_begin < b_end
    b_first = tl.load(p_index + b_begin, mask=m_step, other=0)
    b_last = tl.load(p_index + b_end - 1, mask=m_step, other=0)
    m_whole = m_step & (b_last - b_first == b_end - 1 - b_begin)
    tl.store(p_starts + b_s, tl.where(m_whole, b_first, -1), mask=b_s < num_steps)


@triton.jit(do_not_specialize=_LENGTHS)
def row_trajectories_kernel(
    p_row_steps,
    p_index,
    p_offsets,
    p_steps,
    p_counts,
    p_states,
    p_rows,
    num_rows,
    num_steps,
    BS: tl.constexpr,
):
    """Find the row of each step by bisection, and with it the steps of its trajectory."""
    b_s = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    m_step = b_s < num_steps
    b_low = tl.zeros([BS], tl.int64)
    b_high = tl.zeros([BS], tl.int64) + num_rows
    width = tl.full((), 0, tl.int64) + num_rows
    while width > 0:
        b_middle = (b_low + b_high) // 2
        m_open = m_step & (b_low < b_high)
        m_before = tl.load(p_row_steps + b_middle + 1, mask=m_open, other=0) <= b_s
        b_low = tl.where(m_open & m_before, b_middle + 1, b_low)
        b_high = tl.where(m_open & ~m_before, b_middle, b_high)
        width = width // 2
    b_begin = tl.load(p_row_steps + b_low, mask=m_step, other=0)
    b_end = tl.load(p_row_steps + b_low + 1, mask=m_step, other=0)
    b_first = tl.load(p_offsets + b_s, mask=m_step, other=0)
    tl.store(p_steps + b_s, b_s, mask=m_step)
    tl.store(p_counts + b_s, (b_end - b_begin).to(tl.int32), mask=m_step)
    tl.store(p_states + b_s, tl.load(p_index + b_first, mask=m_step, other=0), mask=m_step)
    tl.store(p_rows + b_s, b_low, mask=m_step)


@triton.jit
def _first_at_least(p_step_ids, p_index, b_s, num_actions, BS: tl.constexpr):
    b_low = tl.zeros([BS], tl.int64)
    b_high = tl.zeros([BS], tl.int64) + num_actions
    width = tl.full((), 0, tl.int64) + num_actions
    while width > 0:
        b_middle = (b_low + b_high) // 2
        m_open = b_low < b_high
        b_pos = tl.load(p_index + b_middle, mask=m_open, other=0)
        m_less = tl.load(p_step_ids + b_pos, mask=m_open, other=0) < b_s
        b_low = tl.where(m_open & m_less, b_middle + 1, b_low)
        b_high = tl.where(m_open & ~m_less, b_middle, b_high)
        width = width // 2
    return b_low


def compact(step_ids: Tensor, num_steps: int, num_tokens: int) -> tuple[Tensor, ...]:
    """Return the CSR form of ascending `step_ids`."""
    length = step_ids.numel()
    blocks = cdiv(length, FLAT_BLOCK)
    token_index = step_ids.new_empty((num_tokens,), dtype=torch.int64)
    step_offsets = step_ids.new_empty((num_steps + 1,), dtype=torch.int64)
    step_lengths = step_ids.new_empty((num_steps,))
    step_starts = step_ids.new_empty((num_steps,), dtype=torch.int64)
    first = step_ids.new_zeros((blocks + 1,), dtype=torch.int64)
    options = {"ALIGNED": aligned(length), "BT": FLAT_BLOCK} | threads(FLAT_BLOCK)
    with device_guard(step_ids):
        if blocks:
            compact_kernel[(blocks,)](step_ids, None, None, first[1:], length, **options)
            first = first.cumsum(0)
            compact_kernel[(blocks,)](step_ids, first, token_index, None, length, **options)
        step_offsets_kernel[(cdiv(num_steps + 1, _SEARCH_BLOCK),)](
            step_ids,
            token_index,
            step_offsets,
            step_lengths,
            step_starts,
            num_steps,
            num_tokens,
            BS=_SEARCH_BLOCK,
            **threads(_SEARCH_BLOCK),
            **all_registers(),
        )
    return token_index, step_offsets, step_lengths, step_starts


def row_trajectories(
    row_steps: Tensor, token_index: Tensor, step_offsets: Tensor
) -> tuple[Tensor, ...]:
    """Make every row a trajectory of its steps, none of which is empty."""
    num_steps = step_offsets.numel() - 1
    steps, states, rows = (step_offsets.new_empty((num_steps,)) for _ in range(3))
    counts = step_offsets.new_empty((num_steps,), dtype=torch.int32)
    if num_steps:
        with device_guard(row_steps):
            row_trajectories_kernel[(cdiv(num_steps, _SEARCH_BLOCK),)](
                row_steps,
                token_index,
                step_offsets,
                steps,
                counts,
                states,
                rows,
                row_steps.numel() - 1,
                num_steps,
                BS=_SEARCH_BLOCK,
                **threads(_SEARCH_BLOCK),
            )
    return steps, counts, states, rows
