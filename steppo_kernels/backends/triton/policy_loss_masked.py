"""The policy loss on a mask: each program finds the runs of ones of its rows by itself.

The formulas stand in `policy_loss.py`, which is the form on a layout. Advantages are given per
token: the surrogate of a run is taken of both signs of an advantage, and every token picks its own.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import KernelConfig
from .launch import aligned, all_registers, device_guard, programs, row_block, threads
from .policy_sums import (
    FIELDS,
    extremes,
    find_center,
    finish,
    fixed_limits,
    largest,
    new_gradients,
    new_partials,
    read_center,
    smallest,
    store_partials,
)
from .step_math import (
    CENTERED,
    GEOMETRIC,
    TOKEN,
    TOKEN_MEAN,
    TRAJECTORY_MEAN,
    TV,
    clip_tokens,
    kl_k3,
    kl_terms,
    of_advantage,
    pool,
    probability_gap,
    signed_surrogates,
    surrogate,
    times,
)
from .tiles import by_four, chunk, last, running_max, running_sum

# Numbers of the scratch a run, by the ratio.
_RUN_NUMBERS = {TOKEN.value: 1, CENTERED.value: 7}


@triton.jit
def _log_probs(p_new, p_old, b_pos, m_row, m_token):
    """Return new and old log-probs of a chunk, 0 where no token acts."""
    b_new = tl.load(p_new + b_pos, mask=m_row, other=0.0)
    b_new = tl.where(m_token, b_new, 0.0)
    b_old = b_new
    if p_old is not None:
        b_old = tl.load(p_old + b_pos, mask=m_row, other=0.0)
        b_old = tl.where(m_token, b_old, 0.0)
    return b_new, b_old


@triton.jit
def _actions(p_mask, i_flat, b_lane, m_row, t, length):
    """Return which tokens of a chunk act, and which of them end a run."""
    m_token = tl.load(p_mask + i_flat + b_lane, mask=m_row, other=0) != 0
    m_next = t + 1 + b_lane < length
    b_next = tl.load(p_mask + i_flat + 1 + b_lane, mask=m_next, other=0)
    return m_token, m_token & (b_next == 0)


@triton.jit(do_not_specialize=["num_rows", "row_length", "max_runs"])
def policy_loss_masked_kernel(
    p_new,
    p_old,
    p_adv,
    p_ref,
    p_entropy,
    p_is,
    p_mask,
    p_center,
    p_runs,
    p_grad,
    p_grad_entropy,
    p_partials,
    num_rows,
    row_length,
    max_runs,
    center: tl.float64,
    low: tl.float64,
    high: tl.float64,
    dual_clip: tl.float64,
    token_low: tl.float64,
    token_high: tl.float64,
    soft_positive: tl.float64,
    soft_negative: tl.float64,
    log_ratio_max: tl.float64,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    NUM_CENTERS: tl.constexpr,
    RATIO: tl.constexpr,
    SURROGATE: tl.constexpr,
    REDUCTION: tl.constexpr,
    KL: tl.constexpr,
    TOKEN_CLIP: tl.constexpr,
    RUN_NUMBERS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
):
    """Each program takes rows: lengths and sums of z by run, then the runs, then the tokens.

    `p_runs` is the program's scratch, RUN_NUMBERS a run: length and sum of z; then 1 / length, and
    with a ratio of runs the length with flags in its last bits, the values and then the slopes of
    A = 1 and A = -1 in turn, and, of a centered ratio, L_s^-1/2.
    """
    i_p = tl.program_id(0).to(tl.int64)
    length = row_length.to(tl.int64)
    p_length = p_runs + i_p * max_runs * RUN_NUMBERS
    # The sums of z lie where the flags will.
    p_flags = p_length + max_runs
    p_value = p_flags + max_runs
    p_slope = p_value + max_runs + max_runs
    p_scale = p_slope + max_runs + max_runs

    mu = read_center(p_center, center, NUM_CENTERS)
    # Ratios are those of tokens or of runs.
    units: tl.constexpr = BT if RATIO == TOKEN else BR
    kind: tl.constexpr = p_new.dtype.element_ty if RATIO == TOKEN else tl.float64
    b_ratios = tl.zeros([BT // 4 if RATIO == TOKEN else BR], tl.float64)
    b_min = tl.full([units], float("inf"), kind)
    b_max = tl.full([units], float("-inf"), kind)
    b_policy = tl.zeros([BT // 4], tl.float64)
    # Sums over runs are those of z, where there are any and no token is clamped.
    z_by_token: tl.constexpr = TOKEN_CLIP or RATIO == TOKEN
    b_z_all = tl.zeros([BT // 4 if z_by_token else BR], tl.float64)
    b_k3 = tl.zeros([BT // 4], tl.float64)
    b_kl = tl.zeros([BT // 4], tl.float64)
    b_entropy = tl.zeros([BT // 4], tl.float64)
    b_low = tl.zeros([BT // 4], tl.float64)
    b_high = tl.zeros([BT // 4], tl.float64)
    b_clipped_tokens = tl.zeros([BT // 4], tl.int32)
    b_dead = tl.zeros([BT // 4], tl.int32)
    b_tokens = tl.zeros([BR], tl.int64)
    steps = tl.full((), 0, tl.int64)
    trajectories = tl.full((), 0, tl.int64)

    for i_row in range(i_p, num_rows, tl.num_programs(0)):
        i_begin = i_row * length
        if ALIGNED:
            i_begin = tl.multiple_of(i_begin, 16)

        carry = tl.full((), 0.0, tl.float64)
        carry_length = tl.full((), 0.0, tl.float64)
        runs = tl.full((), 0, tl.int64)
        for t in range(0, length, BT):
            i_flat, b_lane, m_row = chunk(i_begin, t, length, ALIGNED, BT)
            m_token, m_last = _actions(p_mask, i_flat, b_lane, m_row, t, length)
            if RATIO != TOKEN:
                b_new, b_old = _log_probs(p_new, p_old, i_flat + b_lane, m_row, m_token)
                b_z = b_new.to(tl.float64) - b_old.to(tl.float64)
                b_k3 += by_four(kl_k3(b_z.to(b_new.dtype)).to(tl.float64), BT)
            if TOKEN_CLIP:
                b_z_all += by_four(b_z, BT)
                b_adv = tl.load(p_adv + i_flat + b_lane, mask=m_row, other=0.0)
                b_z, _ = clip_tokens(b_z, b_adv, token_low, token_high)
                b_z = tl.where(m_token, b_z, 0.0)
            # The lane at which the run of a token begins, 0 if that was before.
            b_reset = tl.where(m_token, 0, b_lane + 1)
            if RATIO == TOKEN:
                b_start = running_max(b_reset)
            else:
                b_sum, b_start = running_sum(b_z, b_reset)
                b_sum = tl.where(b_start == 0, b_sum + carry, b_sum)
            b_len = (b_lane + 1 - b_start).to(tl.float64)
            b_len = tl.where(b_start == 0, b_len + carry_length, b_len)
            b_run = tl.cumsum(m_last.to(tl.int32), 0) - 1
            tl.store(p_length + runs + b_run, b_len, mask=m_last)
            if RATIO != TOKEN:
                tl.store(p_flags + runs + b_run, b_sum, mask=m_last)
                carry = last(b_sum, b_lane, BT)
            carry_length = last(b_len, b_lane, BT)
            runs += tl.sum(m_last.to(tl.int32), 0)
        # The threads of a program read what others of it wrote.
        tl.debug_barrier()

        for r in range(0, runs, BR):
            b_run = r + tl.arange(0, BR)
            m_step = b_run < runs
            b_len = tl.load(p_length + b_run, mask=m_step, other=1.0)
            if RATIO != TOKEN:
                b_sum = tl.load(p_flags + b_run, mask=m_step, other=0.0)
            # Several threads may hold the same run: all have read it before any writes to it.
            tl.debug_barrier()
            b_tokens += tl.where(m_step, b_len, 0.0).to(tl.int64)
            b_inverse = 1.0 / b_len
            tl.store(p_length + b_run, b_inverse, mask=m_step)
            if RATIO != TOKEN:
                if not z_by_token:
                    b_z_all += b_sum
                b_x, b_scale = pool(b_sum, b_len, b_inverse, mu, RATIO)
                if RATIO == CENTERED:
                    tl.store(p_scale + b_run, b_scale, mask=m_step)
                (
                    b_rho,
                    b_value,
                    b_slope,
                    m_clipped,
                    b_value_negative,
                    b_slope_negative,
                    m_clipped_negative,
                ) = signed_surrogates(
                    b_x,
                    tl.full((), low, tl.float64),
                    tl.full((), high, tl.float64),
                    dual_clip,
                    soft_positive,
                    soft_negative,
                    log_ratio_max,
                    SURROGATE,
                )
                b_both = 2 * r + 2 * tl.arange(0, BR)
                tl.store(p_value + b_both, b_value, mask=m_step)
                tl.store(p_value + b_both + 1, b_value_negative, mask=m_step)
                tl.store(p_slope + b_both, b_slope, mask=m_step)
                tl.store(p_slope + b_both + 1, b_slope_negative, mask=m_step)
                b_flags = tl.where(m_clipped, 1, 0) + tl.where(m_clipped_negative, 2, 0)
                b_flags += tl.where(b_rho < 1, 4, 0)
                b_flags = b_flags.to(tl.int64) + b_len.to(tl.int64) * 8
                tl.store(p_flags + b_run, b_flags.to(tl.float64, bitcast=True), mask=m_step)
                b_ratios += tl.where(m_step, b_rho, 0.0)
                b_min, b_max = extremes(b_min, b_max, b_rho, m_step)
        steps += runs
        trajectories += tl.where(runs > 0, 1, 0)
        tl.debug_barrier()

        done = tl.full((), 0, tl.int64)
        for t in range(0, length, BT):
            i_flat, b_lane, m_row = chunk(i_begin, t, length, ALIGNED, BT)
            m_token, m_last = _actions(p_mask, i_flat, b_lane, m_row, t, length)
            b_last = m_last.to(tl.int32)
            b_run = tl.cumsum(b_last, 0) - b_last
            b_inverse = tl.load(p_length + done + b_run, mask=m_token, other=0.0)
            if RATIO != TOKEN:
                b_flags = tl.load(p_flags + done + b_run, mask=m_token, other=0.0)
                b_flags = b_flags.to(tl.int64, bitcast=True)
            # w_s / L_s
            b_unit = b_inverse
            if REDUCTION == TRAJECTORY_MEAN:
                share = 1.0 / tl.where(runs > 0, runs, 1).to(tl.float64)
                b_unit = share * b_inverse
            elif REDUCTION == TOKEN_MEAN:
                if RATIO == TOKEN:
                    b_unit = tl.where(m_token, 1.0, 0.0).to(tl.float64)
                else:
                    b_len = (b_flags >> 3).to(tl.float64)
                    b_unit = b_len * b_inverse
            b_adv = tl.load(p_adv + i_flat + b_lane, mask=m_row, other=0.0)
            b_adv = tl.where(m_token, b_adv, 0.0)
            if RATIO == TOKEN or TOKEN_CLIP:
                b_new, b_old = _log_probs(p_new, p_old, i_flat + b_lane, m_row, m_token)
            if RATIO == TOKEN:
                b_x = b_new - b_old
                b_z_all += by_four(b_x.to(tl.float64), BT)
                b_k3 += by_four(kl_k3(b_x).to(tl.float64), BT)
                b_gap = probability_gap(b_new, b_old) if SURROGATE == TV else b_x
                b_rho, b_value, b_slope, m_clipped, m_below = surrogate(
                    b_x,
                    b_gap,
                    b_adv,
                    tl.full((), low, tl.float64),
                    tl.full((), high, tl.float64),
                    dual_clip,
                    soft_positive,
                    soft_negative,
                    log_ratio_max,
                    SURROGATE,
                )
                b_ratios += by_four(tl.where(m_token, b_rho.to(tl.float64) * b_inverse, 0.0), BT)
                b_min, b_max = extremes(b_min, b_max, b_rho, m_token)
                b_grad = times(b_slope.to(tl.float64), b_unit)
            else:
                b_sign = 2 * b_run + (b_adv < 0).to(tl.int32)
                b_value, b_grad, m_clipped = of_advantage(
                    b_adv,
                    tl.load(p_value + 2 * done + b_sign, mask=m_token, other=0.0),
                    tl.load(p_slope + 2 * done + b_sign, mask=m_token, other=0.0),
                    (b_flags & tl.where(b_adv < 0, 2, 1)) != 0,
                    SURROGATE,
                )
                m_below = (b_flags & 4) != 0
                # Times L_s^-p, then w_s: the order of the form on a layout.
                if RATIO == GEOMETRIC:
                    b_grad = b_grad * b_inverse
                elif RATIO == CENTERED:
                    b_grad = b_grad * tl.load(p_scale + done + b_run, mask=m_token, other=0.0)
                if REDUCTION == TRAJECTORY_MEAN:
                    b_grad = b_grad * share
                elif REDUCTION == TOKEN_MEAN:
                    b_grad = b_grad * b_len
            m_clipped = m_clipped & m_token
            b_clipped_tokens += by_four(m_clipped.to(tl.int32), BT)
            b_low += by_four(tl.where(m_clipped & m_below, b_inverse, 0.0), BT)
            b_high += by_four(tl.where(m_clipped & ~m_below, b_inverse, 0.0), BT)

            b_loss = b_unit * b_value.to(tl.float64)
            if p_is is not None:
                b_is = tl.load(p_is + i_flat + b_lane, mask=m_row, other=0.0)
                b_is = tl.where(m_token, b_is, 0.0).to(tl.float64)
                b_loss = b_loss * b_is
                b_grad = times(b_grad, b_is)
            b_policy += by_four(b_loss, BT)
            if TOKEN_CLIP:
                b_z = b_new.to(tl.float64) - b_old.to(tl.float64)
                _, m_bitten = clip_tokens(b_z, b_adv, token_low, token_high)
                b_grad = tl.where(m_bitten, 0.0, b_grad)
            m_dead = m_token & (b_grad == 0)
            if p_ref is not None:
                b_new = tl.load(p_new + i_flat + b_lane, mask=m_row, other=0.0)
                b_ref = tl.load(p_ref + i_flat + b_lane, mask=m_row, other=0.0)
                b_d = tl.where(m_token, b_ref, 0.0) - tl.where(m_token, b_new, 0.0)
                b_kl_value, b_kl_slope = kl_terms(b_d, KL)
                b_kl += by_four(b_unit * b_kl_value.to(tl.float64), BT)
                b_grad += times(times(kl_coef, b_unit), b_kl_slope.to(tl.float64))
                m_dead = m_token & (b_grad == 0)
            if p_entropy is not None:
                b_h = tl.load(p_entropy + i_flat + b_lane, mask=m_row, other=0.0)
                b_entropy += by_four(b_unit * tl.where(m_token, b_h, 0.0).to(tl.float64), BT)
                b_entropy_unit = times(entropy_coef, b_unit)
                m_dead = m_dead & (b_entropy_unit == 0)
            b_dead += by_four(m_dead.to(tl.int32), BT)
            done += tl.sum(b_last, 0)
            if p_grad is not None:
                tl.store(p_grad + i_flat + b_lane, b_grad, mask=m_row)
            if p_grad_entropy is not None:
                tl.store(p_grad_entropy + i_flat + b_lane, -b_entropy_unit, mask=m_row)
        # The next row overwrites the scratch.
        tl.debug_barrier()

    store_partials(
        p_partials + i_p * FIELDS,
        tl.sum(b_policy, 0),
        tl.sum(b_kl, 0),
        tl.sum(b_entropy, 0),
        tl.sum(b_ratios, 0),
        smallest(b_min),
        largest(b_max),
        tl.sum(b_low, 0),
        tl.sum(b_high, 0),
        tl.sum(b_clipped_tokens.to(tl.int64), 0),
        tl.sum(b_z_all, 0),
        tl.sum(b_k3, 0),
        tl.sum(b_dead.to(tl.int64), 0),
        steps,
        tl.sum(b_tokens, 0),
        trajectories,
    )


def policy_loss_masked(
    log_probs: Tensor,
    entropy: Tensor | None,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    ref_log_probs: Tensor | None,
    is_weights: Tensor | None,
    ratio_center: Tensor | None,
    normalizer: Tensor | None,
    mask: Tensor,
    row_length: int,
    config: Sequence[float],
    need_grad: bool,
    need_entropy_grad: bool,
) -> tuple[Tensor | None, ...]:
    """Return loss, metrics and gradients: see `operators.policy_loss_masked`."""
    c = KernelConfig(*config)
    num_rows = log_probs.numel() // max(row_length, 1)
    num_programs = programs(num_rows)
    max_runs = row_length // 2 + 1
    # Numbers of 64 bits fill the registers of a thread with half as many tokens.
    is_wide = log_probs.dtype == torch.float64
    block = min(row_block(row_length), 512 if is_wide else 1024)
    mask = mask.view(torch.uint8)
    grad, grad_entropy = new_gradients(log_probs, need_grad, need_entropy_grad)
    partials = new_partials(log_probs, num_programs)
    run_numbers = _RUN_NUMBERS.get(int(c.ratio), 6)
    runs = log_probs.new_empty((num_programs * run_numbers * max_runs,), dtype=torch.float64)
    with device_guard(log_probs):
        p_center, center, num_centers = find_center(
            log_probs, old_log_probs, advantages, None, None, mask, ratio_center, c, True
        )
        policy_loss_masked_kernel[(num_programs,)](
            log_probs,
            old_log_probs,
            advantages,
            ref_log_probs,
            entropy,
            is_weights,
            mask,
            p_center,
            runs,
            grad,
            grad_entropy,
            partials,
            num_rows,
            row_length,
            max_runs,
            center,
            *fixed_limits(c),
            c.dual_clip,
            c.token_clip_low,
            c.token_clip_high,
            c.soft_positive,
            c.soft_negative,
            c.log_ratio_max,
            c.kl_coef,
            c.entropy_coef,
            NUM_CENTERS=num_centers,
            RATIO=int(c.ratio),
            SURROGATE=int(c.surrogate),
            REDUCTION=int(c.reduction),
            KL=int(c.kl_estimator),
            # On-policy, z is 0 and no clamp bites.
            TOKEN_CLIP=c.clips_tokens and old_log_probs is not None,
            RUN_NUMBERS=run_numbers,
            ALIGNED=aligned(row_length),
            BR=min(block, 128),
            BT=block,
            **threads(block, 2 if is_wide else 4),
            **all_registers(),
        )
        loss, metrics, scale = finish(log_probs, partials, normalizer, c)
    return loss, metrics, grad, grad_entropy, scale
