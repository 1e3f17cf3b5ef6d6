"""The clipped value loss at the states where steps begin.

    l_s = 1/2 max((v - R)^2, (v_old + clip(v - v_old, +-c) - R)^2)

The first kernel makes partial sums, and zeros the gradient where values are per token. The second
one writes the gradient at the states, and its first program finishes the sums: means, and squared
deviations from them, which are combined as sum n_p (m_p - m)^2 + sum of those within a program.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...outputs import NUM_VALUE_METRICS
from ..records import States, record
from .launch import FLAT_BLOCK, MAX_PROGRAMS, aligned, cdiv, device_guard, programs, scalar, threads
from .policy_steps import step_weights
from .step_math import clamp, denominator
from .tiles import chunk, combine_deviations, deviations

_FIELDS = tl.constexpr(10)
_LENGTHS = ["num_steps", "num_values", "num_partials"]
_BLOCK_STEPS = 1024


@triton.jit
def _step_values(
    p_values,
    p_returns,
    p_old,
    p_weights,
    p_state_index,
    p_lengths,
    p_counts,
    b_s,
    m_s,
    clip,
    VALUES_PER_TOKEN: tl.constexpr,
    RETURNS_PER_TOKEN: tl.constexpr,
    OLD_PER_TOKEN: tl.constexpr,
    REDUCTION: tl.constexpr,
):
    """Return for a block of steps, 0 where one is empty.

    That is: whether it counts, its length, where its value is, value, return, loss, gradient,
    whether it is clipped, w_s, what it is of its trajectory.
    """
    b_len = tl.load(p_lengths + b_s, mask=m_s, other=0)
    m_kept = b_len > 0
    b_state = b_s
    if VALUES_PER_TOKEN or RETURNS_PER_TOKEN or OLD_PER_TOKEN:
        b_state = tl.load(p_state_index + b_s, mask=m_kept, other=0)
    b_at = b_state if VALUES_PER_TOKEN else b_s
    b_v = tl.load(p_values + b_at, mask=m_kept, other=0.0).to(tl.float64)
    b_return_at = b_state if RETURNS_PER_TOKEN else b_s
    b_return = tl.load(p_returns + b_return_at, mask=m_kept, other=0.0).to(tl.float64)
    b_error = b_v - b_return
    b_loss = b_error * b_error
    m_clipped = m_kept & False
    if p_old is not None:
        b_old_at = b_state if OLD_PER_TOKEN else b_s
        b_old = tl.load(p_old + b_old_at, mask=m_kept, other=0.0).to(tl.float64)
        b_moved = b_v - b_old
        b_other = b_old + clamp(b_moved, -clip, clip) - b_return
        m_moved = m_kept & ~(tl.abs(b_moved) <= clip)
        m_clipped = m_moved & (b_other * b_other > b_loss)
        # No number is larger than a NaN: it becomes both the loss and the gradient.
        m_nan = m_moved & (b_other != b_other)
        b_loss = tl.where(m_clipped | m_nan, b_other * b_other, b_loss)
        b_error = tl.where(m_nan, b_other, b_error)
    b_w, b_share = step_weights(p_weights, p_counts, b_s, b_len, m_kept, REDUCTION)
    b_grad = tl.where(m_clipped, 0.0, b_w * b_error)
    return m_kept, b_len, b_at, b_v, b_return, 0.5 * b_loss, b_grad, m_clipped, b_w, b_share


@triton.jit(do_not_specialize=_LENGTHS)
def value_loss_kernel(
    p_values,
    p_returns,
    p_old,
    p_weights,
    p_state_index,
    p_lengths,
    p_counts,
    p_grad,
    p_partials,
    num_steps,
    num_values,
    clip: tl.float64,
    VALUES_PER_TOKEN: tl.constexpr,
    RETURNS_PER_TOKEN: tl.constexpr,
    OLD_PER_TOKEN: tl.constexpr,
    REDUCTION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BS: tl.constexpr,
    BZ: tl.constexpr,
):
    """Each program zeros blocks of the gradient, then adds up blocks of steps."""
    i_p = tl.program_id(0).to(tl.int64)
    if p_grad is not None:
        length = num_values.to(tl.int64)
        for i_block in range(i_p, tl.cdiv(length, BZ), tl.num_programs(0)):
            i_flat, b_lane, m_value = chunk(0, i_block * BZ, length, ALIGNED, BZ)
            b_zero = tl.zeros([BZ], p_grad.dtype.element_ty)
            tl.store(p_grad + i_flat + b_lane, b_zero, mask=m_value)

    loss = tl.full((), 0.0, tl.float64)
    total = tl.full((), 0.0, tl.float64)
    clipped = tl.full((), 0.0, tl.float64)
    tokens = tl.full((), 0.0, tl.float64)
    count = tl.full((), 0.0, tl.float64)
    value = tl.full((), 0.0, tl.float64)
    mean = tl.full((), 0.0, tl.float64)
    spread = tl.full((), 0.0, tl.float64)
    residual_mean = tl.full((), 0.0, tl.float64)
    residual_spread = tl.full((), 0.0, tl.float64)
    for i_block in range(i_p, tl.cdiv(num_steps, BS), tl.num_programs(0)):
        b_s = i_block * BS + tl.arange(0, BS)
        m_kept, b_len, _, b_v, b_return, b_loss, _, m_clipped, b_w, b_share = _step_values(
            p_values,
            p_returns,
            p_old,
            p_weights,
            p_state_index,
            p_lengths,
            p_counts,
            b_s,
            b_s < num_steps,
            clip,
            VALUES_PER_TOKEN,
            RETURNS_PER_TOKEN,
            OLD_PER_TOKEN,
            REDUCTION,
        )
        loss += tl.sum(b_w * b_loss, 0)
        total += tl.sum(b_share, 0)
        clipped += tl.sum(m_clipped.to(tl.float64), 0)
        tokens += tl.sum(b_len.to(tl.float64), 0)
        value += tl.sum(b_v, 0)
        _, mean, spread = deviations(count, mean, spread, b_return, m_kept)
        count, residual_mean, residual_spread = deviations(
            count, residual_mean, residual_spread, b_return - b_v, m_kept
        )
    p_out = p_partials + i_p * _FIELDS
    tl.store(p_out, loss)
    tl.store(p_out + 1, total)
    tl.store(p_out + 2, clipped)
    tl.store(p_out + 3, tokens)
    tl.store(p_out + 4, value)
    tl.store(p_out + 5, count)
    tl.store(p_out + 6, mean)
    tl.store(p_out + 7, spread)
    tl.store(p_out + 8, residual_mean)
    tl.store(p_out + 9, residual_spread)


@triton.jit
def _finish(
    p_partials,
    p_normalizer,
    p_loss,
    p_metrics,
    p_scale,
    num_partials,
    normalizer,
    GIVEN: tl.constexpr,
    REDUCTION: tl.constexpr,
    BP: tl.constexpr,
):
    """Add up the partial sums in a fixed order: loss, metrics and 1 / normalizer."""
    b_p = tl.arange(0, BP)
    m_p = b_p < num_partials
    p_row = p_partials + b_p * _FIELDS
    loss = tl.sum(tl.load(p_row, mask=m_p, other=0.0), 0)
    shares = tl.sum(tl.load(p_row + 1, mask=m_p, other=0.0), 0)
    clipped = tl.sum(tl.load(p_row + 2, mask=m_p, other=0.0), 0)
    tokens = tl.sum(tl.load(p_row + 3, mask=m_p, other=0.0), 0)
    value = tl.sum(tl.load(p_row + 4, mask=m_p, other=0.0), 0)
    b_count = tl.load(p_row + 5, mask=m_p, other=0.0)
    steps, mean, spread = combine_deviations(
        b_count,
        tl.load(p_row + 6, mask=m_p, other=0.0),
        tl.load(p_row + 7, mask=m_p, other=0.0),
    )
    _, _, unexplained = combine_deviations(
        b_count,
        tl.load(p_row + 8, mask=m_p, other=0.0),
        tl.load(p_row + 9, mask=m_p, other=0.0),
    )
    total, count = denominator(p_normalizer, normalizer, steps, shares, tokens, GIVEN, REDUCTION)
    divisor = tl.where(steps > 0, steps, 1.0)
    explained = 1.0 - unexplained / tl.where(spread == 0, 1.0, spread)
    tl.store(p_loss, loss / total)
    tl.store(p_metrics, loss / total)
    tl.store(p_metrics + 1, clipped / divisor)
    tl.store(p_metrics + 2, value / divisor)
    tl.store(p_metrics + 3, mean)
    tl.store(p_metrics + 4, tl.where(spread == 0, 0.0, explained))
    tl.store(p_metrics + 5, steps)
    tl.store(p_metrics + 6, count)
    tl.store(p_metrics + 7, spread)
    tl.store(p_metrics + 8, unexplained)
    tl.store(p_scale, 1.0 / total)


@triton.jit(do_not_specialize=_LENGTHS)
def finish_value_loss_kernel(
    p_values,
    p_returns,
    p_old,
    p_weights,
    p_state_index,
    p_lengths,
    p_counts,
    p_grad,
    p_partials,
    p_normalizer,
    p_loss,
    p_metrics,
    p_scale,
    num_steps,
    num_partials,
    clip: tl.float64,
    normalizer: tl.float64,
    GIVEN: tl.constexpr,
    VALUES_PER_TOKEN: tl.constexpr,
    RETURNS_PER_TOKEN: tl.constexpr,
    OLD_PER_TOKEN: tl.constexpr,
    REDUCTION: tl.constexpr,
    BP: tl.constexpr,
    BS: tl.constexpr,
):
    """Write the gradient of a block of steps; program 0 also adds up the partial sums."""
    i_p = tl.program_id(0).to(tl.int64)
    if p_grad is not None:
        b_s = i_p * BS + tl.arange(0, BS)
        m_s = b_s < num_steps
        m_kept, _, b_at, _, _, _, b_grad, _, _, _ = _step_values(
            p_values,
            p_returns,
            p_old,
            p_weights,
            p_state_index,
            p_lengths,
            p_counts,
            b_s,
            m_s,
            clip,
            VALUES_PER_TOKEN,
            RETURNS_PER_TOKEN,
            OLD_PER_TOKEN,
            REDUCTION,
        )
        tl.store(p_grad + b_at, b_grad, mask=m_kept)

    if i_p == 0:
        _finish(
            p_partials,
            p_normalizer,
            p_loss,
            p_metrics,
            p_scale,
            num_partials,
            normalizer,
            GIVEN,
            REDUCTION,
            BP,
        )


def value_loss(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None,
    step_weights: Tensor | None,
    normalizer: Tensor | None,
    states: Sequence[Tensor],
    config: Sequence[float],
    values_per_token: bool,
    returns_per_token: bool,
    old_values_per_token: bool,
    need_grad: bool,
) -> tuple[Tensor | None, ...]:
    """Return loss, metrics, gradient and scale: see `operators.value_loss`."""
    state_index, step_lengths, trajectory_counts = record(States, states)
    clip, reduction = config
    num_steps, num_values = step_lengths.numel(), values.numel()
    step_blocks = cdiv(num_steps, _BLOCK_STEPS)
    fill_blocks = cdiv(num_values, FLAT_BLOCK) if need_grad else 0
    num_programs = programs(max(step_blocks, fill_blocks))
    grad = torch.empty_like(values) if need_grad else None
    loss = values.new_empty(())
    metrics = values.new_empty((NUM_VALUE_METRICS,), dtype=torch.float64)
    scale = metrics.new_empty(())
    partials = values.new_empty((num_programs, _FIELDS.value), dtype=torch.float64)
    p_normalizer, number = scalar(normalizer, values.device)
    inputs = (
        values,
        returns,
        old_values,
        step_weights,
        state_index,
        step_lengths,
        trajectory_counts,
        grad,
        partials,
    )
    with device_guard(values):
        value_loss_kernel[(num_programs,)](
            *inputs,
            num_steps,
            num_values,
            clip,
            VALUES_PER_TOKEN=values_per_token,
            RETURNS_PER_TOKEN=returns_per_token,
            OLD_PER_TOKEN=old_values_per_token,
            REDUCTION=int(reduction),
            ALIGNED=aligned(num_values),
            BS=_BLOCK_STEPS,
            BZ=FLAT_BLOCK,
            **threads(_BLOCK_STEPS),
        )
        finish_value_loss_kernel[(max(1, step_blocks) if need_grad else 1,)](
            *inputs,
            p_normalizer,
            loss,
            metrics,
            scale,
            num_steps,
            num_programs,
            clip,
            number,
            GIVEN=normalizer is not None,
            VALUES_PER_TOKEN=values_per_token,
            RETURNS_PER_TOKEN=returns_per_token,
            OLD_PER_TOKEN=old_values_per_token,
            REDUCTION=int(reduction),
            BP=MAX_PROGRAMS,
            BS=_BLOCK_STEPS,
            **threads(_BLOCK_STEPS),
        )
    return loss, metrics, grad, scale
