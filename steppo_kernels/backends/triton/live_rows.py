"""The rows with a gradient: ranks by one program, then the places of all rows.

Rows that a chunk of logits has are some thousand, and more of them cost little beside their logits.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FLAT_BLOCK, cdiv, device_guard, threads


@triton.jit
def _live(p_grad_log_probs, p_grad_entropy, b_row, m_row):
    """Return which of the rows have a gradient that is not 0; NaN is not 0."""
    m_live = tl.load(p_grad_log_probs + b_row, mask=m_row, other=0.0) != 0.0
    if p_grad_entropy is not None:
        m_live = m_live | (tl.load(p_grad_entropy + b_row, mask=m_row, other=0.0) != 0.0)
    return m_live


@triton.jit(do_not_specialize=["num_rows"])
def rank_live_rows_kernel(
    p_grad_log_probs, p_grad_entropy, p_by_rank, p_counts, num_rows, BT: tl.constexpr
):
    """Write the live rows, then the dead ones, both ascending.

    The counts are that of the live rows, and of those among them that are below that number.
    """
    count = tl.full((), 0, tl.int64)
    for t in range(0, num_rows.to(tl.int64), BT):
        b_row = t + tl.arange(0, BT)
        m_live = _live(p_grad_log_probs, p_grad_entropy, b_row, b_row < num_rows)
        count += tl.sum(m_live.to(tl.int32), 0)
    rank = tl.full((), 0, tl.int64)
    kept = tl.full((), 0, tl.int64)
    for t in range(0, num_rows.to(tl.int64), BT):
        b_row = t + tl.arange(0, BT)
        m_row = b_row < num_rows
        m_live = _live(p_grad_log_probs, p_grad_entropy, b_row, m_row)
        # The live rows up to each row.
        b_rank = rank + tl.cumsum(m_live.to(tl.int32), 0)
        b_place = tl.where(m_live, b_rank - 1, count + b_row - b_rank)
        tl.store(p_by_rank + b_place, b_row, mask=m_row)
        rank += tl.sum(m_live.to(tl.int32), 0)
        kept += tl.sum((m_live & (b_row < count)).to(tl.int32), 0)
    tl.store(p_counts, count)
    tl.store(p_counts + 1, kept)


@triton.jit(do_not_specialize=["num_rows"])
def place_live_rows_kernel(p_by_rank, p_counts, p_order, num_rows, BT: tl.constexpr):
    """Write live rows where they are, those from `count` on to the places of dead ones before it.

    There are as many of these, and they come first among the dead.
    """
    b_rank = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_rank = b_rank < num_rows
    count = tl.load(p_counts)
    kept = tl.load(p_counts + 1)
    b_row = tl.load(p_by_rank + b_rank, mask=m_rank, other=0)
    m_moved = m_rank & (b_rank < count) & (b_row >= count)
    b_hole = tl.load(p_by_rank + (count - kept) + b_rank, mask=m_moved, other=0)
    b_place = tl.where(m_moved, b_hole, tl.where(b_rank < count, b_row, b_rank))
    tl.store(p_order + b_place, b_row, mask=m_rank)


def order_live_rows(
    grad_log_probs: Tensor, grad_entropy: Tensor | None, ascending: bool
) -> tuple[Tensor, Tensor]:
    """Run the operator `order_live_rows` of `steppo_kernels.backends.operators`."""
    num_rows = grad_log_probs.numel()
    by_rank = grad_log_probs.new_empty((num_rows,), dtype=torch.int64)
    counts = grad_log_probs.new_empty((2,), dtype=torch.int64)
    order = by_rank if ascending else torch.empty_like(by_rank)
    with device_guard(by_rank):
        rank_live_rows_kernel[(1,)](
            grad_log_probs,
            grad_entropy,
            by_rank,
            counts,
            num_rows,
            BT=FLAT_BLOCK,
            **threads(FLAT_BLOCK),
        )
        if not ascending and num_rows:
            place_live_rows_kernel[(cdiv(num_rows, FLAT_BLOCK),)](
                by_rank, counts, order, num_rows, BT=FLAT_BLOCK, **threads(FLAT_BLOCK)
            )
    return order, counts[0]
