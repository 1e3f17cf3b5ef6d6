"""Products of the output head with the rows of its weight that are kept.

    x_p = h_n . w_v + b_v    dh_n = sum g_p w_v    dw_v = sum g_p h_n    of pairs p = (n, v)

A program takes some rows at a time, and a block of their columns, 16 bytes of each row a thread
where all of them begin at multiples of that.
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

from ..kept_operators import sums_of_parts
from ..records import IdIndex, Sets, record
from .launch import aligned, all_registers, cdiv, device_guard, threads
from .tiles import kept_set

# A program has this many rows on their way at once. More would take more registers, and short sets
# would not fill them.
_ROWS = 8
# Bytes of a row that a thread loads at once; loads of a row that it does where that cannot be.
_THREADS, _LOAD_BYTES, _MOST_LOADS = 128, 16, 4
# Products are split among this many programs, or more where sets are long in the mean. The host
# does not know which sets are much longer: most of the programs of short ones find nothing to do.
_PROGRAMS = 32768
_LENGTHS = ["size", "weight_stride", "num_blocks"]
# Slices of these begin anywhere.
_ARRAYS = [
    "p_logits",
    "p_grad_logits",
    "p_bias",
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
]


@triton.jit
def _block_of(num_blocks):
    """Return what a program is about, and which of its `num_blocks` blocks is the program's."""
    i_program = tl.program_id(0)
    i_whole = i_program // num_blocks
    return i_whole, (i_program - i_whole * num_blocks).to(tl.int64)


@triton.jit
def _start(b_row, stride, ALIGNED: tl.constexpr):
    """Return where rows begin that are `stride` apart; with ALIGNED, that is a multiple of 16."""
    b_row = b_row.to(tl.int64)
    # A product is known to be one on every GPU. Hints are lost on some.
    return b_row * (stride // 16) * 16 if ALIGNED else b_row * stride


@triton.jit
def _inside(b_lane, i_column, size, ALIGNED: tl.constexpr):
    """Return which columns from `i_column` on are in rows of this size."""
    left = size - i_column
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    return b_lane < left


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
def kept_logits_kernel(
    p_logits,
    p_hidden,
    p_weight,
    p_bias,
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
    """Each program writes every `num_blocks`-th block of a token's pairs, BR of them."""
    dtype = p_logits.dtype.element_ty
    i_row, i_block = _block_of(num_blocks)
    token, first, count = kept_set(p_rows, p_offsets, i_row)
    p_state = p_hidden + _start(token, size, ALIGNED)
    b_lane = tl.arange(0, BD)
    for i_pair in range(i_block * BR, count, num_blocks.to(tl.int64) * BR):
        b_pair = i_pair + tl.arange(0, BR)
        m_pair = b_pair < count
        b_id = tl.load(p_ids + first + b_pair, mask=m_pair, other=0)
        p_kept = p_weight + _start(b_id, weight_stride, ALIGNED)[:, None]
        b_sum = tl.zeros([BR, BD], dtype)
        for i_column in range(0, size, BD):
            m_column = _inside(b_lane, i_column, size, ALIGNED)
            m_in = m_pair[:, None] & m_column[None, :]
            b_w = tl.load(p_kept + i_column + b_lane[None, :], mask=m_in, other=0.0)
            b_h = tl.load(p_state + i_column + b_lane, mask=m_column, other=0.0)
            b_sum += b_w.to(dtype) * b_h.to(dtype)[None, :]
        b_logit = tl.sum(b_sum, 1)
        if p_bias is not None:
            b_logit += tl.load(p_bias + b_id, mask=m_pair, other=0.0).to(dtype)
        tl.store(p_logits + first + b_pair, b_logit, mask=m_pair)


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
    i_row, i_block = _block_of(num_blocks)
    i_column = i_block * BD
    token, first, count = kept_set(p_rows, p_offsets, i_row)
    b_lane = tl.arange(0, BD)
    m_column = _inside(b_lane, i_column, size, ALIGNED)
    b_sum = tl.zeros([BD], p_grad_logits.dtype.element_ty)
    for i_pair in range(first, first + count, BR):
        b_pair = i_pair + tl.arange(0, BR)
        m_pair = b_pair < first + count
        b_grad = tl.load(p_grad_logits + b_pair, mask=m_pair, other=0.0)
        b_start = _start(tl.load(p_ids + b_pair, mask=m_pair, other=0), weight_stride, ALIGNED)
        b_sum += _sum_of_rows(p_weight + i_column, b_start, b_grad, b_lane, m_column)
    p_out = p_grad_hidden + _start(token, size, ALIGNED) + i_column
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
    i_part, i_block = _block_of(num_blocks)
    i_column = i_block * BD
    begin = tl.load(p_parts + i_part)
    end = tl.load(p_parts + i_part + 1)
    b_lane = tl.arange(0, BD)
    m_column = _inside(b_lane, i_column, size, ALIGNED)
    b_sum = tl.zeros([BD], p_grad_logits.dtype.element_ty)
    b_bias = tl.zeros([BR], p_grad_logits.dtype.element_ty)
    for i_entry in range(begin, end, BR):
        b_entry = i_entry + tl.arange(0, BR)
        m_entry = b_entry < end
        b_pair = tl.load(p_pairs + b_entry, mask=m_entry, other=0)
        b_grad = tl.load(p_grad_logits + b_pair, mask=m_entry, other=0.0)
        b_start = _start(tl.load(p_tokens + b_entry, mask=m_entry, other=0), size, ALIGNED)
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
        p_out = p_grad_weight + _start(row, size, ALIGNED) + i_column
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
    BD: tl.constexpr,
):
    """Each program adds up a block of columns of what the parts of a long id have left."""
    i_long, i_block = _block_of(num_blocks)
    i_column = i_block * BD
    begin = tl.load(p_long_slots + i_long)
    end = tl.load(p_long_slots + i_long + 1)
    b_lane = tl.arange(0, BD)
    m_column = _inside(b_lane, i_column, size, ALIGNED)
    b_sum = tl.zeros([BD], p_sums.dtype.element_ty)
    bias = tl.full((), 0.0, p_sums.dtype.element_ty)
    for i_slot in range(begin, end):
        p_slot = p_sums + i_slot * (size + 1)
        b_sum += tl.load(p_slot + i_column + b_lane, mask=m_column, other=0.0)
        bias += tl.load(p_slot + size)
    row = _gradient_row(p_ids, p_long_ids, i_long)
    p_out = p_grad_weight + _start(row, size, ALIGNED) + i_column
    tl.store(p_out + b_lane, b_sum.to(p_grad_weight.dtype.element_ty), mask=m_column)
    if p_grad_bias is not None:
        tl.store(p_grad_bias + row, bias, mask=i_block == 0)


def _options(rows: Tensor, *lengths: int) -> dict[str, int]:
    """Return how kernels are launched on rows of these sizes and strides."""
    is_aligned = all(aligned(length) for length in lengths)
    most = _LOAD_BYTES // rows.element_size()
    per_thread = most if is_aligned else min(most, _MOST_LOADS)
    return {
        "ALIGNED": is_aligned,
        "BD": _THREADS * per_thread,
        **threads(_THREADS, 1),
        **({} if is_aligned else all_registers()),
    }


def kept_logits(
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    sets: Sequence[Tensor],
    by_id: Sequence[Tensor],
) -> None:
    """Run the operator `kept_logits` of `steppo_kernels.backends.kept_operators`."""
    held = record(Sets, sets)
    size, weight_stride = hidden.shape[1], weight.stride(0)
    num_rows, num_pairs = rows.shape[0], held.ids.shape[0]
    if not num_rows or not num_pairs:
        return
    mean = cdiv(num_pairs, held.offsets.shape[0] - 1)
    num_blocks = min(cdiv(num_pairs, _ROWS), max(2 * cdiv(mean, _ROWS), cdiv(_PROGRAMS, num_rows)))
    with device_guard(logits):
        kept_logits_kernel[(num_rows * num_blocks,)](
            logits,
            hidden,
            weight,
            bias,
            rows,
            held.ids,
            held.offsets,
            size,
            weight_stride,
            num_blocks,
            BR=_ROWS,
            **_options(weight, size, weight_stride),
        )


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
    options = _options(weight, size, weight_stride)
    num_blocks = cdiv(size, options["BD"])
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
            BR=_ROWS,
            **options,
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
    num_parts, num_long = held.part_ids.shape[0], held.long_ids.shape[0]
    if not num_parts:
        return
    size, sums = hidden.shape[1], sums_of_parts(hidden, held)
    options = _options(hidden, size)
    # Without columns there is the gradient of the bias still.
    num_blocks = max(1, cdiv(size, options["BD"]))
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
            BR=_ROWS,
            **options,
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
                **options,
            )
