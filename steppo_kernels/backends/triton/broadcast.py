"""Steps to tokens, x_i = y_{s(i)}, and its transpose, y_s = sum of x_i over the tokens of s."""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import FLAT_BLOCK, STEP_THREADS, aligned, cdiv, device_guard, step_tile, threads
from .tiles import chunk


@triton.jit(do_not_specialize=["num_tokens"])
def broadcast_kernel(
    p_per_step, p_step_ids, p_out, num_tokens, ALIGNED: tl.constexpr, BT: tl.constexpr
):
    """Each program writes BT tokens."""
    length = num_tokens.to(tl.int64)
    i_chunk = tl.program_id(0).to(tl.int64) * BT
    i_flat, b_lane, m_token = chunk(0, i_chunk, length, ALIGNED, BT)
    b_step = tl.load(p_step_ids + i_flat + b_lane, mask=m_token, other=-1)
    b_out = tl.load(p_per_step + b_step, mask=b_step >= 0, other=0.0)
    tl.store(p_out + i_flat + b_lane, b_out, mask=m_token)


@triton.jit(do_not_specialize=["num_steps"])
def sum_over_steps_kernel(
    p_per_token, p_index, p_offsets, p_out, num_steps, BS: tl.constexpr, BT: tl.constexpr
):
    """Each program adds up BS steps, in fp64."""
    b_s = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    b_lane = tl.arange(0, BT)[None, :]
    m_s = b_s < num_steps
    b_begin = tl.load(p_offsets + b_s, mask=m_s, other=0)
    b_len = tl.load(p_offsets + b_s + 1, mask=m_s, other=0) - b_begin
    b_sum = tl.zeros([BS, BT], tl.float64)
    for t in range(0, tl.max(b_len, 0), BT):
        m_token = t + b_lane < b_len[:, None]
        b_pos = tl.load(p_index + t + b_begin[:, None] + b_lane, mask=m_token, other=0)
        b_sum += tl.load(p_per_token + b_pos, mask=m_token, other=0.0).to(tl.float64)
    tl.store(p_out + b_s, tl.sum(b_sum, 1), mask=m_s)


def broadcast_to_tokens(per_step: Tensor, step_ids: Tensor) -> Tensor:
    """Give every action token the entry of its step, other tokens 0: ``[S]`` to ``[N]``."""
    num_tokens = step_ids.numel()
    out = per_step.new_empty((num_tokens,))
    if num_tokens:
        with device_guard(out):
            broadcast_kernel[(cdiv(num_tokens, FLAT_BLOCK),)](
                per_step,
                step_ids,
                out,
                num_tokens,
                ALIGNED=aligned(num_tokens),
                BT=FLAT_BLOCK,
                **threads(FLAT_BLOCK),
            )
    return out


def sum_over_steps(per_token: Tensor, token_index: Tensor, step_offsets: Tensor) -> Tensor:
    """Add up the tokens of each step: ``[N]`` to ``[S]``."""
    num_steps = step_offsets.numel() - 1
    out = per_token.new_empty((num_steps,))
    if num_steps:
        block_steps, block_tokens = step_tile(token_index.numel(), num_steps)
        with device_guard(out):
            sum_over_steps_kernel[(cdiv(num_steps, block_steps),)](
                per_token,
                token_index,
                step_offsets,
                out,
                num_steps,
                BS=block_steps,
                BT=block_tokens,
                **threads(STEP_THREADS, 1),
            )
    return out
