"""Log-probs and entropies over the kept ids of each token, and the gradient of their logits.

A program takes a token. Forward reads the logits of its set twice, the second time out of a cache:
for the largest, and for sums over all but the token's own. As in `token_log_probs`, this one joins
at the end, so that the log-prob of a certain token keeps its precision.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Sets, record
from .launch import all_registers, device_guard, threads
from .tiles import kept_set
from .token_math import FAR, LN_2, LOG2_E, expm1, log1p, row_scales, scaled, soft_cap

# Ids that a program takes at a time, where sets are short in the mean and where they are not.
_SHORT, _LONG = 128, 1024
# Slices of these begin anywhere, and so do sets among the pairs.
_ARRAYS = [
    "p_grad",
    "p_logits",
    "p_places",
    "p_rows",
    "p_offsets",
    "p_temperatures",
    "p_log_probs",
    "p_entropy",
    "p_top",
    "p_log_sum",
    "p_grad_log_probs",
    "p_grad_entropy",
]


@triton.jit
def _others(p_set, b_lane, count, place, cap, high, low, SOFTCAP: tl.constexpr):
    """Load a block of a set without the token's own id: -inf there and beyond the end."""
    m_other = (b_lane < count) & (b_lane != place)
    b_z = tl.load(p_set + b_lane, mask=m_other, other=float("-inf"))
    if SOFTCAP:
        b_capped, _ = soft_cap(b_z, cap, high, low)
        b_z = tl.where(m_other, b_capped, float("-inf"))
    return b_z


@triton.jit(do_not_specialize_on_alignment=_ARRAYS)
def kept_log_probs_kernel(
    p_logits,
    p_places,
    p_rows,
    p_offsets,
    p_temperatures,
    p_log_probs,
    p_entropy,
    p_top,
    p_log_sum,
    inverse: tl.float64,
    softcap: tl.float64,
    SOFTCAP: tl.constexpr,
    BK: tl.constexpr,
):
    """Each program reads the set of one row's token."""
    i_row = tl.program_id(0)
    dtype = p_log_probs.dtype.element_ty
    _, first, count = kept_set(p_rows, p_offsets, i_row)
    inverse, scale, cap, high, low = row_scales(p_temperatures, i_row, inverse, softcap, dtype)
    p_set = p_logits + first
    place = tl.load(p_places + i_row)
    is_there = place >= 0

    b_max = tl.full([BK], float("-inf"), dtype)
    for i_chunk in range(0, count, BK):
        b_lane = i_chunk + tl.arange(0, BK)
        b_max = tl.maximum(b_max, _others(p_set, b_lane, count, place, cap, high, low, SOFTCAP))
    logit = tl.load(p_set + place, mask=is_there, other=float("-inf"))
    z = logit
    if SOFTCAP:
        capped, _ = soft_cap(logit, cap, high, low)
        z = tl.where(is_there, capped, float("-inf"))
    top = tl.maximum(tl.max(b_max, 0), z, propagate_nan=tl.PropagateNan.ALL)
    around = tl.where(top == float("-inf"), 0.0, top)

    b_sum = tl.zeros([BK], dtype)
    b_weighted = tl.zeros([BK], dtype)
    for i_chunk in range(0, count, BK):
        b_lane = i_chunk + tl.arange(0, BK)
        b_z = _others(p_set, b_lane, count, place, cap, high, low, SOFTCAP)
        b_d = (b_z - around) * scale
        b_e = tl.exp2(b_d)
        b_sum += b_e
        if p_entropy is not None:
            b_weighted += b_e * tl.maximum(b_d, FAR)

    others = tl.sum(b_sum, 0).to(tl.float64)
    # An id that is nowhere adds e^-inf.
    down = (z - around).to(tl.float64) * inverse
    own = tl.exp(down)
    total = others + own
    log_sum = tl.where(own == 1.0, log1p(others), tl.log(total))
    tl.store(p_log_probs + i_row, tl.where(is_there, down - log_sum, 0.0))
    tl.store(p_top + i_row, tl.where(is_there, around, top).to(tl.float64))
    tl.store(p_log_sum + i_row, log_sum)
    if p_entropy is not None:
        weighted = tl.sum(b_weighted, 0).to(tl.float64) * LN_2 + own * tl.maximum(down, FAR)
        is_none = (total == 0.0) & (place < 0)
        entropy = log_sum - weighted / tl.where(is_none, 1.0, total)
        tl.store(p_entropy + i_row, tl.where(is_none, 0.0, entropy))


@triton.jit(do_not_specialize_on_alignment=_ARRAYS)
def kept_log_probs_backward_kernel(
    p_grad,
    p_logits,
    p_places,
    p_rows,
    p_offsets,
    p_temperatures,
    p_top,
    p_log_sum,
    p_entropy,
    p_grad_log_probs,
    p_grad_entropy,
    inverse: tl.float64,
    softcap: tl.float64,
    SOFTCAP: tl.constexpr,
    BK: tl.constexpr,
):
    """Each program writes the set of one row's token; it loads an entry before it overwrites it."""
    i_row = tl.program_id(0)
    dtype = p_grad_log_probs.dtype.element_ty
    _, first, count = kept_set(p_rows, p_offsets, i_row)
    p_out = p_grad + first
    slope = tl.load(p_grad_log_probs + i_row)
    is_live = slope != 0
    if p_grad_entropy is not None:
        entropy_slope = tl.load(p_grad_entropy + i_row)
        is_live = is_live | (entropy_slope != 0)

    if is_live:
        p_set = p_logits + first
        inverse, scale, cap, high, low = row_scales(p_temperatures, i_row, inverse, softcap, dtype)
        # Between logits, differences are exact where e^z is not small.
        top = tl.load(p_top + i_row).to(dtype)
        log_sum = (tl.load(p_log_sum + i_row) * LOG2_E).to(dtype)
        place = tl.load(p_places + i_row)
        slope = scaled(slope, -inverse, dtype)
        if p_grad_entropy is not None:
            entropy_part = scaled(entropy_slope * tl.load(p_entropy + i_row), -inverse, dtype)
            entropy_slope = scaled(entropy_slope, -inverse * LN_2, dtype)
        for i_chunk in range(0, count, BK):
            b_lane = i_chunk + tl.arange(0, BK)
            m_in = b_lane < count
            b_z = tl.load(p_set + b_lane, mask=m_in, other=float("-inf"))
            if SOFTCAP:
                b_z, b_bend = soft_cap(b_z, cap, high, low)
            b_d = (b_z - top) * scale - log_sum
            b_p = tl.exp2(b_d)
            b_less = b_p
            if (place >= i_chunk) & (place < i_chunk + BK):
                # p - 1 at the token, without cancellation.
                m_token = b_lane == place
                minus = expm1(tl.sum(tl.where(m_token, b_d, 0.0), 0) * LN_2)
                b_less = tl.where(m_token, minus, b_p)
            b_grad = slope * b_less
            if p_grad_entropy is not None:
                b_grad += (b_p * tl.maximum(b_d, FAR)) * entropy_slope + b_p * entropy_part
            if SOFTCAP:
                b_grad = b_grad * b_bend
            tl.store(p_out + b_lane, b_grad, mask=m_in)
    else:
        b_zero = tl.zeros([BK], dtype)
        for i_chunk in range(0, count, BK):
            b_lane = i_chunk + tl.arange(0, BK)
            tl.store(p_out + b_lane, b_zero, mask=b_lane < count)


def _options(sets: Sets, softcap: float) -> dict[str, int]:
    """Return how the kernels are launched, by the mean length of the sets."""
    num_tokens = sets.offsets.shape[0] - 1
    block = _SHORT if sets.ids.shape[0] <= _SHORT * num_tokens else _LONG
    return {
        "SOFTCAP": softcap != 0,
        "BK": block,
        **threads(block),
        **(all_registers() if softcap else {}),
    }


def kept_log_probs(
    logits: Tensor,
    places: Tensor,
    rows: Tensor,
    sets: Sequence[Tensor],
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    need_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the operator `kept_log_probs` of `steppo_kernels.backends.kept_operators`."""
    held, num_rows = record(Sets, sets), rows.shape[0]
    log_probs = logits.new_empty((num_rows,))
    entropy = logits.new_empty((num_rows if need_entropy else 0,))
    top = logits.new_empty((num_rows,), dtype=torch.float64)
    log_sum = torch.empty_like(top)
    if num_rows:
        with device_guard(logits):
            kept_log_probs_kernel[(num_rows,)](
                logits,
                places,
                rows,
                held.offsets,
                temperatures,
                log_probs,
                entropy if need_entropy else None,
                top,
                log_sum,
                1.0 / temperature,
                softcap,
                **_options(held, softcap),
            )
    return log_probs, entropy, top, log_sum


def kept_log_probs_backward(
    grad_logits: Tensor,
    logits: Tensor,
    places: Tensor,
    rows: Tensor,
    sets: Sequence[Tensor],
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    top: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    """Run the operator `kept_log_probs_backward` of `steppo_kernels.backends.kept_operators`."""
    held = record(Sets, sets)
    if rows.shape[0]:
        with device_guard(logits):
            kept_log_probs_backward_kernel[(rows.shape[0],)](
                grad_logits,
                logits,
                places,
                rows,
                held.offsets,
                temperatures,
                top,
                log_sum,
                entropy if grad_entropy is not None else None,
                grad_log_probs,
                grad_entropy,
                1.0 / temperature,
                softcap,
                **_options(held, softcap),
            )
