"""Gradients of the output head over kept sets.

    dh_n = sum g_p w_v    dw_v = sum g_p h_n    of pairs p = (n, v)

Every number is summed by one program, or by one for each part of a long id and one that joins them,
in an order that does not depend on any other.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..records import IdIndex, Sets, record
from .kept_rows import block_of, inside, options, start
from .launch import cdiv, device_guard
from .tiles import kept_set

_LENGTHS = ["size", "weight_stride", "num_blocks"]
# Slices of these begin anywhere.
_ARRAYS = [
    "p_grad_logits",
    "p_grad_bias",
    "p_rows",
    "p_ids",
    "p_offsets",
    "p_pairs",
    "p_tokens",
    "p_parts",
    "p_part_ids",
    "p_part_slots",
    "p_long_ids",
    "p_long_slots",
    "p_grad_log_probs",
]


@triton.jit
def _sum_of_rows(p_columns, b_start, b_factor, b_lane, m_column):
    """Return the sum of some rows times their factors; rows whose factor is 0 are not read."""
    m_read = (b_factor != 0.0)[:, None] & m_column[None, :]
    b_x = tl.load(p_columns + b_start[:, None] + b_lane[None, :], mask=m_read, other=0.0)
    return tl.sum(b_factor[:, None] * b_x.to(b_factor.dtype), 0)


@triton.jit
def _gradient_row(p_ids, p_numbers, i_number):
    """Return the row of the gradients of an id: that id or, without `p_ids`, its number."""
    row = tl.load(p_numbers + i_number)
    if p_ids is not None:
        row = tl.load(p_ids + row).to(tl.int64)
    return row


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_ARRAYS)
def scale_directions_kernel(
    p_grad_hidden,
    p_directions,
    p_grad_log_probs,
    p_rows,
    size,
    num_blocks,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Each program writes a block of columns of a token's row."""
    i_row, i_block = block_of(num_blocks)
    i_column = i_block * BD
    b_lane = tl.arange(0, BD)
    m_column = inside(b_lane, i_column, size, ALIGNED)
    grad = tl.load(p_grad_log_probs + i_row)
    p_from = p_directions + start(i_row, size, ALIGNED) + i_column
    # Without a gradient, it does not matter what the log-prob does.
    b_x = tl.load(p_from + b_lane, mask=m_column, other=0.0)
    b_out = tl.where(grad == 0.0, 0.0, grad * b_x)
    p_out = p_grad_hidden + start(tl.load(p_rows + i_row), size, ALIGNED) + i_column
    tl.store(p_out + b_lane, b_out.to(p_grad_hidden.dtype.element_ty), mask=m_column)


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_ARRAYS)
def kept_hidden_gradient_kernel(
    p_grad_hidden,
    p_grad_logits,
    p_weight,
    p_rows,
    p_ids,
    p_offsets,
    size,
    weight_stride: tl.int64,
    num_blocks,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Each program writes a block of columns of a token's row."""
    i_row, i_block = block_of(num_blocks)
    i_column = i_block * BD
    token, first, count = kept_set(p_rows, p_offsets, i_row)
    b_lane = tl.arange(0, BD)
    m_column = inside(b_lane, i_column, size, ALIGNED)
    b_sum = tl.zeros([BD], p_grad_logits.dtype.element_ty)
    for i_pair in range(first, first + count, BR):
        b_pair = i_pair + tl.arange(0, BR)
        m_pair = b_pair < first + count
        b_grad = tl.load(p_grad_logits + b_pair, mask=m_pair, other=0.0)
        b_start = start(tl.load(p_ids + b_pair, mask=m_pair, other=0), weight_stride, ALIGNED)
        b_sum += _sum_of_rows(p_weight + i_column, b_start, b_grad, b_lane, m_column)
    p_out = p_grad_hidden + start(token, size, ALIGNED) + i_column
    tl.store(p_out + b_lane, b_sum.to(p_grad_hidden.dtype.element_ty), mask=m_column)


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_ARRAYS)
def kept_weight_gradient_kernel(
    p_grad_weight,
    p_grad_bias,
    p_sums,
    p_grad_logits,
    p_hidden,
    p_ids,
    p_pairs,
    p_tokens,
    p_parts,
    p_part_ids,
    p_part_slots,
    size,
    num_blocks,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Each program writes a block of columns of the sum of a part, to its id's row or its slot."""
    i_part, i_block = block_of(num_blocks)
    i_column = i_block * BD
    begin = tl.load(p_parts + i_part)
    end = tl.load(p_parts + i_part + 1)
    b_lane = tl.arange(0, BD)
    m_column = inside(b_lane, i_column, size, ALIGNED)
    b_sum = tl.zeros([BD], p_grad_logits.dtype.element_ty)
    b_bias = tl.zeros([BR], p_grad_logits.dtype.element_ty)
    for i_entry in range(begin, end, BR):
        b_entry = i_entry + tl.arange(0, BR)
        m_entry = b_entry < end
        b_pair = tl.load(p_pairs + b_entry, mask=m_entry, other=0)
        b_grad = tl.load(p_grad_logits + b_pair, mask=m_entry, other=0.0)
        b_start = start(tl.load(p_tokens + b_entry, mask=m_entry, other=0), size, ALIGNED)
        b_sum += _sum_of_rows(p_hidden + i_column, b_start, b_grad, b_lane, m_column)
        b_bias += b_grad
    bias = tl.sum(b_bias, 0)
    slot = tl.load(p_part_slots + i_part)
    if slot >= 0:
        p_slot = p_sums + slot * (size + 1)
        tl.store(p_slot + i_column + b_lane, b_sum, mask=m_column)
        tl.store(p_slot + size, bias, mask=i_block == 0)
    else:
        row = _gradient_row(p_ids, p_part_ids, i_part)
        p_out = p_grad_weight + start(row, size, ALIGNED) + i_column
        tl.store(p_out + b_lane, b_sum.to(p_grad_weight.dtype.element_ty), mask=m_column)
        if p_grad_bias is not None:
            tl.store(p_grad_bias + row, bias, mask=i_block == 0)


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_ARRAYS)
def join_parts_kernel(
    p_grad_weight,
    p_grad_bias,
    p_sums,
    p_ids,
    p_long_ids,
    p_long_slots,
    size,
    num_blocks,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Each program adds up a block of columns of what the parts of a long id have left."""
    i_long, i_block = block_of(num_blocks)
    i_column = i_block * BD
    begin = tl.load(p_long_slots + i_long)
    end = tl.load(p_long_slots + i_long + 1)
    b_lane = tl.arange(0, BD)
    m_column = inside(b_lane, i_column, size, ALIGNED)
    b_sum = tl.zeros([BD], p_sums.dtype.element_ty)
    bias = tl.full((), 0.0, p_sums.dtype.element_ty)
    for i_slot in range(begin, end):
        p_slot = p_sums + i_slot * (size + 1)
        b_sum += tl.load(p_slot + i_column + b_lane, mask=m_column, other=0.0)
        bias += tl.load(p_slot + size)
    row = _gradient_row(p_ids, p_long_ids, i_long)
    p_out = p_grad_weight + start(row, size, ALIGNED) + i_column
    tl.store(p_out + b_lane, b_sum.to(p_grad_weight.dtype.element_ty), mask=m_column)
    if p_grad_bias is not None:
        tl.store(p_grad_bias + row, bias, mask=i_block == 0)


def kept_hidden_gradient(
    grad_hidden: Tensor,
    grad_logits: Tensor,
    weight: Tensor,
    rows: Tensor,
    sets: Sequence[Tensor],
) -> None:
    """Run the operator `kept_hidden_gradient` of `steppo_kernels.backends.kept_operators`."""
    held = record(Sets, sets)
    size, weight_stride, num_rows = weight.shape[1], weight.stride(0), rows.shape[0]
    launch = options(weight, size, weight_stride)
    num_blocks = cdiv(size, launch["BD"])
    if not num_rows or not num_blocks:
        return
    with device_guard(grad_hidden):
        kept_hidden_gradient_kernel[(num_rows * num_blocks,)](
            grad_hidden,
            grad_logits,
            weight,
            rows,
            held.ids,
            held.offsets,
            size,
            weight_stride,
            num_blocks,
            **launch,
        )


def kept_weight_gradient(
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    grad_logits: Tensor,
    hidden: Tensor,
    by_id: Sequence[Tensor],
    compact: bool,
) -> None:
    """Run the operator `kept_weight_gradient` of `steppo_kernels.backends.kept_operators`."""
    held = record(IdIndex, by_id)
    if not compact:
        grad_weight.zero_()
        if grad_bias is not None:
            grad_bias.zero_()
    num_parts, num_long = held.part_ids.shape[0], held.long_ids.shape[0]
    if not num_parts:
        return
    size, sums = hidden.shape[1], held.new_sums(hidden)
    launch = options(hidden, size)
    # Without columns there is the gradient of the bias still.
    num_blocks = max(1, cdiv(size, launch["BD"]))
    ids = None if compact else held.ids
    with device_guard(grad_weight):
        kept_weight_gradient_kernel[(num_parts * num_blocks,)](
            grad_weight,
            grad_bias,
            sums,
            grad_logits,
            hidden,
            ids,
            held.pairs,
            held.tokens,
            held.parts,
            held.part_ids,
            held.part_slots,
            size,
            num_blocks,
            **launch,
        )
        if num_long:
            join_parts_kernel[(num_long * num_blocks,)](
                grad_weight,
                grad_bias,
                sums,
                ids,
                held.long_ids,
                held.long_slots,
                size,
                num_blocks,
                **launch,
            )


def scale_directions(
    grad_hidden: Tensor, directions: Tensor, grad_log_probs: Tensor, rows: Tensor
) -> None:
    """Run the operator `scale_directions` of `steppo_kernels.backends.kept_operators`."""
    size, num_rows = directions.shape[1], rows.shape[0]
    launch = options(grad_hidden, size)
    num_blocks = cdiv(size, launch["BD"])
    if not num_rows or not num_blocks:
        return
    with device_guard(grad_hidden):
        scale_directions_kernel[(num_rows * num_blocks,)](
            grad_hidden, directions, grad_log_probs, rows, size, num_blocks, **launch
        )
