"""Log-probs and entropies of tokens from rows of logits, and the gradient of the logits.

A program takes a row. Forward reads it once, with a running maximum m and the sums

    s = sum e^(z - m)    w = sum e^(z - m) (z - m)

in every lane, scaled again only when m grows, over all logits but the token's own; this one joins
at the end. Then log sum e^z = m + log s, and the entropy is log s - w / s, two terms that are never
negative. Where the token's is the largest, log s = log(1 + others) keeps the precision of the
others, and so does p - 1 in backward, which reads a row once and writes it once.

A lane takes the 16 bytes of one load, so that its maximum needs no other lane; all lanes meet once,
at the end of the row. Fewer rows than a GPU has processors leave some of these idle: rows are not
split.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import all_registers, device_guard, threads
from .token_math import FAR, LN_2, LOG2_E, expm1, log1p, row_scales, scaled, soft_cap

# Entries of the vocabulary that a program takes at a time, the bytes of them at most, threads.
_BLOCK, _BLOCK_BYTES, _THREADS = 4096, 16384, 256
_LENGTHS = [
    "num_columns",
    "row_length",
    "stride_b",
    "stride_t",
    "grad_stride_b",
    "grad_stride_t",
]
# Arrays of one number a row: slices of them begin anywhere.
_ROWS = [
    "p_ids",
    "p_mask",
    "p_temperatures",
    "p_log_probs",
    "p_entropy",
    "p_top",
    "p_log_sum",
    "p_grad_log_probs",
    "p_grad_entropy",
    "p_rows",
]


@triton.jit
def _columns(ALIGNED: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """Return the columns of BR lanes with BK entries each, as what a lane and an entry add.

    The entries of a lane are neighbours if they are loaded at once, else those of an entry are.
    """
    b_lane = tl.arange(0, BR)[:, None]
    b_entry = tl.arange(0, BK)[None, :]
    return (b_lane * BK, b_entry) if ALIGNED else (b_lane, b_entry * BR)


@triton.jit
def _row_start(i_row, row_length, stride_b, stride_t, ALIGNED: tl.constexpr, BK: tl.constexpr):
    """Return where row `i_row` of ``[B, T, V]`` begins."""
    i_b = i_row // row_length
    i_start = i_b * stride_b + (i_row - i_b * row_length) * stride_t
    if ALIGNED:
        i_start = tl.multiple_of(i_start, BK)
    return i_start


@triton.jit
def _inside(b_column, i_chunk, num_columns, ALIGNED: tl.constexpr, BK: tl.constexpr):
    left = num_columns - i_chunk
    if ALIGNED:
        left = tl.multiple_of(left, BK)
    return b_column < left


@triton.jit
def _load(p_row, b_column, i_chunk, num_columns, ALIGNED: tl.constexpr, BK: tl.constexpr):
    """Load a block of a row, -inf beyond its end: e^-inf adds nothing."""
    m_in = _inside(b_column, i_chunk, num_columns, ALIGNED, BK)
    return tl.load(p_row + i_chunk + b_column, mask=m_in, other=float("-inf"))


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_ROWS)
def token_log_probs_kernel(
    p_logits,
    p_ids,
    p_mask,
    p_temperatures,
    p_log_probs,
    p_entropy,
    p_top,
    p_log_sum,
    num_columns,
    row_length,
    stride_b: tl.int64,
    stride_t: tl.int64,
    inverse: tl.float64,
    softcap: tl.float64,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """Each program reads one row."""
    i_row = tl.program_id(0)
    dtype = p_log_probs.dtype.element_ty
    count = num_columns
    if p_mask is not None:
        count = tl.where(tl.load(p_mask + i_row) != 0, num_columns, 0)
    inverse, scale, cap, high, low = row_scales(p_temperatures, i_row, inverse, softcap, dtype)
    p_row = p_logits + _row_start(i_row, row_length, stride_b, stride_t, ALIGNED, BK)
    token = tl.load(p_ids + i_row)

    b_lane, b_entry = _columns(ALIGNED, BR, BK)
    b_column = b_lane + b_entry
    b_max = tl.full([BR], float("-inf"), dtype)
    b_sum = tl.zeros([BR], dtype)
    b_weighted = tl.zeros([BR], dtype)
    for i_chunk in range(0, count, BR * BK):
        b_logit = _load(p_row, b_column, i_chunk, count, ALIGNED, BK)
        b_z = b_logit.to(dtype)
        if SOFTCAP:
            m_in = _inside(b_column, i_chunk, count, ALIGNED, BK)
            b_capped, _ = soft_cap(b_logit, cap, high, low)
            b_z = tl.where(m_in, b_capped, float("-inf"))
        if (token >= i_chunk) & (token < i_chunk + BR * BK):
            m_token = b_entry == (token - i_chunk).to(tl.int32) - b_lane
            b_z = tl.where(m_token, float("-inf"), b_z)
        b_old = b_max
        b_max = tl.maximum(b_max, tl.max(b_z, 1))
        b_from = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_down = (b_old - b_from) * scale
        b_d = (b_z - b_from[:, None]) * scale
        b_e = tl.exp2(b_d)
        b_shrink = tl.exp2(b_down)
        if p_entropy is not None:
            b_moved = b_weighted + b_sum * tl.maximum(b_down, FAR)
            b_weighted = b_moved * b_shrink + tl.sum(b_e * tl.maximum(b_d, FAR), 1)
        b_sum = b_sum * b_shrink + tl.sum(b_e, 1)

    m_valid = (token >= 0) & (token < count)
    logit = tl.load(p_row + token, mask=m_valid, other=float("nan"))
    z = logit.to(dtype)
    if SOFTCAP:
        z, _ = soft_cap(logit, cap, high, low)
    # NaN, of an id out of range as well, stays.
    top = tl.maximum(tl.max(b_max, 0), z, propagate_nan=tl.PropagateNan.ALL)
    top = tl.where(top == float("-inf"), 0.0, top)
    b_down = (b_max - top) * scale
    b_shrink = tl.exp2(b_down)
    others = tl.sum(b_sum * b_shrink, 0).to(tl.float64)
    down = (z - top).to(tl.float64) * inverse
    own = tl.exp(down)
    total = others + own
    log_sum = tl.where(own == 1.0, log1p(others), tl.log(total))
    log_prob = down - log_sum
    tl.store(p_log_probs + i_row, tl.where(count > 0, log_prob, 0.0))
    tl.store(p_top + i_row, tl.where(count > 0, top.to(tl.float64), 0.0))
    tl.store(p_log_sum + i_row, tl.where(count > 0, log_sum, 0.0))
    if p_entropy is not None:
        b_moved = b_weighted + b_sum * tl.maximum(b_down, FAR)
        weighted = tl.sum(b_moved * b_shrink, 0).to(tl.float64) * LN_2
        weighted += own * tl.maximum(down, FAR)
        entropy = log_sum - weighted / total
        tl.store(p_entropy + i_row, tl.where(count > 0, entropy, 0.0))


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_ROWS)
def token_log_probs_backward_kernel(
    p_grad,
    p_logits,
    p_ids,
    p_mask,
    p_temperatures,
    p_top,
    p_log_sum,
    p_entropy,
    p_grad_log_probs,
    p_grad_entropy,
    p_rows,
    num_columns,
    row_length,
    grad_stride_b: tl.int64,
    grad_stride_t: tl.int64,
    stride_b: tl.int64,
    stride_t: tl.int64,
    inverse: tl.float64,
    softcap: tl.float64,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    HALVED: tl.constexpr,
):
    """Each program writes one row; it loads an entry before it, or any other, overwrites it.

    With HALVED, gradients take the first half of the row's memory.
    """
    i_row = tl.program_id(0)
    i_from = i_row
    if p_rows is not None:
        i_from = tl.load(p_rows + i_row).to(tl.int32)
    dtype = p_grad_log_probs.dtype.element_ty
    p_out = p_grad + _row_start(i_row, row_length, grad_stride_b, grad_stride_t, ALIGNED, BK)
    b_lane, b_entry = _columns(ALIGNED, BR, BK)
    b_column = b_lane + b_entry

    slope = tl.load(p_grad_log_probs + i_from)
    is_live = slope != 0
    if p_grad_entropy is not None:
        entropy_slope = tl.load(p_grad_entropy + i_from)
        is_live = is_live | (entropy_slope != 0)
    if p_mask is not None:
        is_live = is_live & (tl.load(p_mask + i_from) != 0)

    if is_live:
        p_row = p_logits + _row_start(i_from, row_length, stride_b, stride_t, ALIGNED, BK)
        inverse, scale, cap, high, low = row_scales(p_temperatures, i_from, inverse, softcap, dtype)
        # Between logits, differences are exact where e^z is not small.
        top = tl.load(p_top + i_from).to(dtype)
        log_sum = (tl.load(p_log_sum + i_from) * LOG2_E).to(dtype)
        token = tl.load(p_ids + i_from)
        m_valid = (token >= 0) & (token < num_columns)
        slope = tl.where(m_valid, scaled(slope, -inverse, dtype), float("nan"))
        if p_grad_entropy is not None:
            entropy_part = scaled(entropy_slope * tl.load(p_entropy + i_from), -inverse, dtype)
            entropy_slope = scaled(entropy_slope, -inverse * LN_2, dtype)
        for i_chunk in range(0, num_columns, BR * BK):
            b_logit = _load(p_row, b_column, i_chunk, num_columns, ALIGNED, BK)
            if HALVED:
                # What a thread overwrites in this block, another has loaded in it.
                tl.debug_barrier()
            b_z = b_logit.to(dtype)
            if SOFTCAP:
                b_z, b_bend = soft_cap(b_logit, cap, high, low)
            b_d = (b_z - top) * scale - log_sum
            b_p = tl.exp2(b_d)
            b_less = b_p
            if (token >= i_chunk) & (token < i_chunk + BR * BK):
                # p - 1 at the token, without cancellation.
                m_token = b_entry == (token - i_chunk).to(tl.int32) - b_lane
                b_minus = expm1(tl.sum(tl.where(m_token, b_d, 0.0), 1) * LN_2)
                b_less = tl.where(m_token, b_minus[:, None], b_p)
            b_grad = slope * b_less
            if p_grad_entropy is not None:
                b_grad += (b_p * tl.maximum(b_d, FAR)) * entropy_slope + b_p * entropy_part
            if SOFTCAP:
                b_grad = b_grad * b_bend
            m_in = _inside(b_column, i_chunk, num_columns, ALIGNED, BK)
            tl.store(p_out + i_chunk + b_column, b_grad.to(p_grad.dtype.element_ty), mask=m_in)
    else:
        b_zero = tl.zeros([BR, BK], p_grad.dtype.element_ty)
        for i_chunk in range(0, num_columns, BR * BK):
            m_in = _inside(b_column, i_chunk, num_columns, ALIGNED, BK)
            tl.store(p_out + i_chunk + b_column, b_zero, mask=m_in)


def _options(softcap: float, *tensors: Tensor) -> dict[str, int]:
    """Return how the kernels are launched on rows of ``[B, T, V]`` tensors.

    Where all rows are 16-byte aligned, a lane loads and stores 16 bytes at once (of the narrowest
    of the dtypes, twice that of fp32 next to it).
    """
    size = min(each.element_size() for each in tensors)
    per_load = 16 // size
    block = min(_BLOCK, _BLOCK_BYTES // size)
    lengths = [tensors[0].shape[2], *(step for each in tensors for step in _strides(each))]
    aligned = all(each.data_ptr() % 16 == 0 for each in tensors) and all(
        length % per_load == 0 for length in lengths
    )
    return {
        "SOFTCAP": softcap != 0,
        "ALIGNED": aligned,
        "BR": block // per_load,
        "BK": per_load,
        **threads(block, block // _THREADS),
        **(all_registers() if softcap else {}),
    }


def _strides(rows: Tensor) -> list[int]:
    """Return the strides of ``[B, T, V]`` over B and T, 0 where there is only one to take."""
    sizes = zip(rows.shape[:2], rows.stride()[:2], strict=True)
    return [stride if size > 1 else 0 for size, stride in sizes]


def _bytes(mask: Tensor | None) -> Tensor | None:
    """Return a mask as bytes, of which those that are not 0 are True."""
    return None if mask is None else mask.view(torch.uint8)


def token_log_probs(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    need_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the operator `token_log_probs` of `steppo_kernels.backends.operators`."""
    num_tokens = token_ids.shape[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_probs = logits.new_empty((num_tokens,), dtype=dtype)
    entropy = logits.new_empty((num_tokens if need_entropy else 0,), dtype=dtype)
    top = logits.new_empty((num_tokens,), dtype=torch.float64)
    log_sum = torch.empty_like(top)
    if num_tokens:
        with device_guard(logits):
            token_log_probs_kernel[(num_tokens,)](
                logits,
                token_ids,
                _bytes(mask),
                temperatures,
                log_probs,
                entropy if need_entropy else None,
                top,
                log_sum,
                logits.shape[2],
                logits.shape[1],
                *_strides(logits),
                1.0 / temperature,
                softcap,
                **_options(softcap, logits),
            )
    return log_probs, entropy, top, log_sum


def token_log_probs_backward(
    grad_logits: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    top: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    rows: Tensor | None,
) -> None:
    """Run the operator `token_log_probs_backward` of `steppo_kernels.backends.operators`."""
    num_tokens = token_ids.shape[0] if rows is None else rows.shape[0]
    if num_tokens:
        with device_guard(logits):
            token_log_probs_backward_kernel[(num_tokens,)](
                grad_logits,
                logits,
                token_ids,
                _bytes(mask),
                temperatures,
                top,
                log_sum,
                entropy,
                grad_log_probs,
                grad_entropy,
                rows,
                logits.shape[2],
                logits.shape[1],
                *_strides(grad_logits),
                *_strides(logits),
                1.0 / temperature,
                softcap,
                **_options(softcap, grad_logits, logits),
                HALVED=grad_logits.element_size() < logits.element_size(),
            )
