"""Products of hidden states with the rows of the weight that their tokens keep.

    x_p = h_n . w_v + b_v    of pairs p = (n, v)    d log p / dh_n = sum (is own - p_v) w_v

A token is a small attention, whose keys and values are the rows of its ids: a row is loaded once,
multiplied with the hidden state, and added to a sum by its softmax, which goes along.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..records import MOST_ROW_BYTES, Sets, record
from .kept_rows import ROWS, block_of, inside, options, start
from .launch import cdiv, device_guard
from .tiles import kept_set
from .token_math import row_scales, soft_cap

# Products are split among this many programs, or more where sets are long in the mean. The host
# does not know which sets are much longer: most of the programs of short ones find nothing to do.
_PROGRAMS = 32768
_LENGTHS = ["size", "weight_stride", "num_blocks"]
# Slices of these begin anywhere.
_ARRAYS = ["p_logits", "p_bias", "p_places", "p_rows", "p_ids", "p_offsets", "p_temperatures"]


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_ARRAYS)
def kept_head_kernel(
    p_logits,
    p_directions,
    p_hidden,
    p_weight,
    p_bias,
    p_places,
    p_rows,
    p_ids,
    p_offsets,
    p_temperatures,
    size,
    weight_stride: tl.int64,
    num_blocks,
    inverse: tl.float64,
    softcap: tl.float64,
    SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Each program writes every `num_blocks`-th block of a token's pairs, BR of them.

    With directions, it writes all of them. With WHOLE, a row has no more columns than a program.
    """
    dtype = p_logits.dtype.element_ty
    i_row, i_block = block_of(num_blocks)
    token, first, count = kept_set(p_rows, p_offsets, i_row)
    p_state = p_hidden + start(token, size, ALIGNED)
    b_lane = tl.arange(0, BD)
    m_row = inside(b_lane, 0, size, ALIGNED)
    if p_directions is not None:
        inverse, scale, cap, high, low = row_scales(p_temperatures, i_row, inverse, softcap, dtype)
        place = tl.load(p_places + i_row)
        b_direction = tl.zeros([BD], dtype)
        top = tl.full((), float("-inf"), dtype)
        total = tl.full((), 0.0, dtype)
        own = tl.full((), 0.0, dtype)
        own_bend = tl.full((), 0.0, dtype)
    for i_pair in range(i_block * BR, count, num_blocks.to(tl.int64) * BR):
        b_pair = i_pair + tl.arange(0, BR)
        m_pair = b_pair < count
        b_id = tl.load(p_ids + first + b_pair, mask=m_pair, other=0)
        p_kept = p_weight + start(b_id, weight_stride, ALIGNED)[:, None]
        if WHOLE:
            m_in = m_pair[:, None] & m_row[None, :]
            b_w = tl.load(p_kept + b_lane[None, :], mask=m_in, other=0.0).to(dtype)
            b_h = tl.load(p_state + b_lane, mask=m_row, other=0.0).to(dtype)
            b_sum = b_w * b_h[None, :]
        else:
            b_sum = tl.zeros([BR, BD], dtype)
            for i_column in range(0, size, BD):
                m_column = inside(b_lane, i_column, size, ALIGNED)
                m_in = m_pair[:, None] & m_column[None, :]
                b_x = tl.load(p_kept + i_column + b_lane[None, :], mask=m_in, other=0.0)
                b_h = tl.load(p_state + i_column + b_lane, mask=m_column, other=0.0)
                b_sum += b_x.to(dtype) * b_h.to(dtype)[None, :]
        b_logit = tl.sum(b_sum, 1)
        if p_bias is not None:
            b_logit += tl.load(p_bias + b_id, mask=m_pair, other=0.0).to(dtype)
        tl.store(p_logits + first + b_pair, b_logit, mask=m_pair)
        if p_directions is not None:
            b_z = b_logit
            b_bend = tl.full([BR], 1.0, dtype)
            if SOFTCAP:
                b_z, b_bend = soft_cap(b_logit, cap, high, low)
            own += tl.sum(tl.where(b_pair == place, b_z, 0.0), 0)
            own_bend += tl.sum(tl.where(b_pair == place, b_bend, 0.0), 0)
            b_z = tl.where(m_pair & (b_pair != place), b_z, float("-inf"))
            before = top
            top = tl.maximum(top, tl.max(b_z, 0))
            around = tl.where(top == float("-inf"), 0.0, top)
            shrinks = tl.exp2((before - around) * scale)
            b_e = tl.exp2((b_z - around) * scale)
            total = total * shrinks + tl.sum(b_e, 0)
            # What has no part in the softmax is not looked at.
            b_factor = (b_e * b_bend)[:, None]
            b_terms = tl.where(b_factor != 0.0, b_factor * b_w, 0.0)
            b_direction = b_direction * shrinks + tl.sum(b_terms, 0)
    if p_directions is not None:
        # What is left of 1 without the token is formed of the others, so that it is exact where the
        # token is certain.
        around = tl.where(top == float("-inf"), 0.0, top)
        down = (own - around).to(tl.float64) * inverse
        is_there = place >= 0
        of_own = tl.where(is_there, tl.exp(tl.minimum(down, 0.0)), 0.0)
        shift = tl.where(is_there, tl.exp(tl.minimum(-down, 0.0)), 1.0)
        others = total.to(tl.float64) * shift
        whole = others + of_own
        whole = tl.where(whole == 0.0, 1.0, whole)
        factor = (-shift / whole * inverse).to(dtype)
        own_factor = tl.where(is_there, (others / whole * inverse).to(dtype) * own_bend, 0.0)
        b_direction *= factor
        if own_factor != 0.0:
            id = tl.load(p_ids + first + place)
            p_own = p_weight + start(id, weight_stride, ALIGNED)
            b_own = tl.load(p_own + b_lane, mask=m_row, other=0.0)
            b_direction += own_factor * b_own.to(dtype)
        p_out = p_directions + start(i_row, size, ALIGNED)
        tl.store(p_out + b_lane, b_direction, mask=m_row)


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
    num_rows, num_pairs = rows.shape[0], record(Sets, sets).ids.shape[0]
    if not num_rows or not num_pairs:
        return
    mean = cdiv(num_pairs, record(Sets, sets).offsets.shape[0] - 1)
    blocks = max(2 * cdiv(mean, ROWS), cdiv(_PROGRAMS, num_rows))
    of_rows = None, rows, sets, None, 1.0, 0.0
    _launch(logits, None, hidden, weight, bias, *of_rows, min(cdiv(num_pairs, ROWS), blocks))


def kept_directions(
    logits: Tensor,
    directions: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    places: Tensor,
    rows: Tensor,
    sets: Sequence[Tensor],
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
) -> None:
    """Run the operator `kept_directions` of `steppo_kernels.backends.kept_operators`."""
    if rows.shape[0]:
        of_rows = places, rows, sets, temperatures, temperature, softcap
        _launch(logits, directions, hidden, weight, bias, *of_rows, 1)


def _launch(
    logits: Tensor,
    directions: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    places: Tensor | None,
    rows: Tensor,
    sets: Sequence[Tensor],
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    num_blocks: int,
) -> None:
    held = record(Sets, sets)
    size, weight_stride = hidden.shape[1], weight.stride(0)
    is_whole = size * weight.element_size() <= MOST_ROW_BYTES
    with device_guard(logits):
        kept_head_kernel[(rows.shape[0] * num_blocks,)](
            logits,
            directions,
            hidden,
            weight,
            bias,
            places,
            rows,
            held.ids,
            held.offsets,
            temperatures,
            size,
            weight_stride,
            num_blocks,
            1.0 / temperature,
            softcap,
            SOFTCAP=softcap != 0,
            WHOLE=is_whole,
            **options(weight, size, weight_stride, whole=size if is_whole else 0),
        )
