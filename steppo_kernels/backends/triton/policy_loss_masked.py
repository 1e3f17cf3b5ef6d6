"""The policy loss on a mask: each program finds the runs of ones of its rows by itself.

The formulas stand in `policy_loss.py`, which is the form on a layout.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import aligned, device_guard, programs, row_block, threads
from .policy_sums import (
    FIELDS,
    add_steps,
    find_center,
    finish,
    largest,
    needs_token_pass,
    new_gradients,
    new_partials,
    or_empty,
    read_center,
    smallest,
    store_partials,
)
from .step_math import TOKEN_MEAN, TRAJECTORY_MEAN, kl_k3, kl_terms, step_terms, times
from .tiles import chunk, last, running_sum


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
    log_ratio_max: tl.float64,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    NUM_CENTERS: tl.constexpr,
    RATIO: tl.constexpr,
    REDUCTION: tl.constexpr,
    KL: tl.constexpr,
    TOKEN_PASS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
):
    """Each program takes rows: sums of z by run, then the runs, then the tokens.

    `p_runs` is the program's scratch, three numbers a run: sum of z, first token and length; then
    slope, weight of a token and weighted loss of a token.
    """
    i_p = tl.program_id(0).to(tl.int64)
    length = row_length.to(tl.int64)
    p_a = p_runs + i_p * max_runs * 3
    p_b = p_a + max_runs
    p_c = p_b + max_runs

    mu = read_center(p_center, center, NUM_CENTERS)
    b_policy = tl.zeros([BR], tl.float64)
    b_ratios = tl.zeros([BR], tl.float64)
    b_min = tl.full([BR], float("inf"), tl.float64)
    b_max = tl.full([BR], float("-inf"), tl.float64)
    b_low = tl.zeros([BR], tl.int32)
    b_high = tl.zeros([BR], tl.int32)
    b_clipped_tokens = tl.zeros([BR], tl.int64)
    b_z_all = tl.zeros([BR], tl.float64)
    b_dead = tl.zeros([BR], tl.int64)
    b_tokens = tl.zeros([BR], tl.int64)
    b_k3 = tl.zeros([BT], tl.float64)
    b_is_policy = tl.zeros([BT], tl.float64)
    b_kl = tl.zeros([BT], tl.float64)
    b_entropy = tl.zeros([BT], tl.float64)
    b_dead_tokens = tl.zeros([BT], tl.int32)
    steps = tl.full((), 0, tl.int64)
    trajectories = tl.full((), 0, tl.int64)

    for i_row in range(i_p, num_rows, tl.num_programs(0)):
        i_begin = i_row * length
        if ALIGNED:
            i_begin = tl.multiple_of(i_begin, 16)

        carry = tl.full((), 0.0, tl.float64)
        carry_start = tl.full((), 0, tl.int64)
        runs = tl.full((), 0, tl.int64)
        for t in range(0, length, BT):
            i_flat, b_lane, m_row = chunk(i_begin, t, length, ALIGNED, BT)
            m_token = tl.load(p_mask + i_flat + b_lane, mask=m_row, other=0) != 0
            m_next = t + 1 + b_lane < length
            m_last = m_token & (tl.load(p_mask + i_flat + 1 + b_lane, mask=m_next, other=0) == 0)
            b_new = tl.load(p_new + i_flat + b_lane, mask=m_row, other=0.0)
            b_new = tl.where(m_token, b_new, 0.0)
            b_old = b_new
            if p_old is not None:
                b_old = tl.load(p_old + i_flat + b_lane, mask=m_row, other=0.0)
                b_old = tl.where(m_token, b_old, 0.0)
            b_z = b_new.to(tl.float64) - b_old.to(tl.float64)
            b_k3 += kl_k3(b_z.to(b_new.dtype)).to(tl.float64)
            b_sum, b_start = running_sum(b_z, tl.where(m_token, 0, b_lane + 1))
            b_sum = tl.where(b_start == 0, b_sum + carry, b_sum)
            b_first = tl.where(b_start == 0, carry_start, t + b_start)
            b_run = runs + tl.cumsum(m_last.to(tl.int32), 0) - 1
            tl.store(p_a + b_run, b_sum, mask=m_last)
            tl.store(p_b + b_run, b_first.to(tl.float64), mask=m_last)
            tl.store(p_c + b_run, (t + 1 + b_lane - b_first).to(tl.float64), mask=m_last)
            carry = last(b_sum, b_lane, BT)
            carry_start = last(b_first, b_lane, BT)
            runs += tl.sum(m_last.to(tl.int32), 0)
        # The threads of a program read what others of it wrote.
        tl.debug_barrier()

        for r in range(0, runs, BR):
            b_run = r + tl.arange(0, BR)
            m_step = b_run < runs
            b_sum = tl.load(p_a + b_run, mask=m_step, other=0.0)
            b_first = tl.load(p_b + b_run, mask=m_step, other=0.0).to(tl.int64)
            b_len = tl.load(p_c + b_run, mask=m_step, other=0.0).to(tl.int64)
            b_adv = tl.load(p_adv + i_begin + b_first, mask=m_step, other=0.0).to(tl.float64)
            b_inverse = 1.0 / tl.where(m_step, b_len, 1).to(tl.float64)
            _, b_ratio, b_loss, b_slope, m_clipped = step_terms(
                b_sum, b_len, b_inverse, b_adv, mu, low, high, dual_clip, log_ratio_max, RATIO
            )
            b_w = tl.full([BR], 1.0, tl.float64)
            if REDUCTION == TRAJECTORY_MEAN:
                b_w = b_w / runs.to(tl.float64)
            elif REDUCTION == TOKEN_MEAN:
                b_w = b_len.to(tl.float64)
            b_slope = times(b_slope, b_w)
            b_unit = b_w * b_inverse
            if TOKEN_PASS:
                tl.store(p_a + b_run, b_slope, mask=m_step)
                tl.store(p_b + b_run, b_unit, mask=m_step)
                tl.store(p_c + b_run, b_unit * b_loss, mask=m_step)
            else:
                b_dead += tl.where(b_slope == 0, b_len, 0)
            b_policy += tl.where(m_step, b_w * b_loss, 0.0)
            b_ratios, b_min, b_max, b_low, b_high, b_clipped_tokens = add_steps(
                b_ratios,
                b_min,
                b_max,
                b_low,
                b_high,
                b_clipped_tokens,
                b_ratio,
                b_adv,
                b_len,
                m_step,
                m_clipped,
            )
            b_z_all += b_sum
            b_tokens += b_len
        steps += runs
        trajectories += tl.where(runs > 0, 1, 0)
        tl.debug_barrier()

        if TOKEN_PASS:
            done = tl.full((), 0, tl.int64)
            for t in range(0, length, BT):
                i_flat, b_lane, m_row = chunk(i_begin, t, length, ALIGNED, BT)
                m_token = tl.load(p_mask + i_flat + b_lane, mask=m_row, other=0) != 0
                m_next = t + 1 + b_lane < length
                b_last = (
                    m_token & (tl.load(p_mask + i_flat + 1 + b_lane, mask=m_next, other=0) == 0)
                ).to(tl.int32)
                b_run = done + tl.cumsum(b_last, 0) - b_last
                done += tl.sum(b_last, 0)
                b_grad = tl.load(p_a + b_run, mask=m_token, other=0.0)
                if p_is is not None:
                    b_is = tl.load(p_is + i_flat + b_lane, mask=m_row, other=0.0)
                    b_is = tl.where(m_token, b_is, 0.0).to(tl.float64)
                    b_is_policy += b_is * tl.load(p_c + b_run, mask=m_token, other=0.0)
                    b_grad = times(b_grad, b_is)
                m_dead = m_token & (b_grad == 0)
                if p_ref is not None or p_entropy is not None:
                    b_unit = tl.load(p_b + b_run, mask=m_token, other=0.0)
                if p_ref is not None:
                    b_new = tl.load(p_new + i_flat + b_lane, mask=m_row, other=0.0)
                    b_ref = tl.load(p_ref + i_flat + b_lane, mask=m_row, other=0.0)
                    b_d = tl.where(m_token, b_ref, 0.0) - tl.where(m_token, b_new, 0.0)
                    b_value, b_kl_slope = kl_terms(b_d, KL)
                    b_kl += b_unit * b_value.to(tl.float64)
                    b_grad += times(times(kl_coef, b_unit), b_kl_slope.to(tl.float64))
                    m_dead = m_token & (b_grad == 0)
                if p_entropy is not None:
                    b_h = tl.load(p_entropy + i_flat + b_lane, mask=m_row, other=0.0)
                    b_entropy += b_unit * tl.where(m_token, b_h, 0.0).to(tl.float64)
                    b_entropy_unit = times(entropy_coef, b_unit)
                    m_dead = m_dead & (b_entropy_unit == 0)
                b_dead_tokens += m_dead.to(tl.int32)
                if p_grad is not None:
                    tl.store(p_grad + i_flat + b_lane, b_grad, mask=m_row)
                if p_grad_entropy is not None:
                    tl.store(p_grad_entropy + i_flat + b_lane, -b_entropy_unit, mask=m_row)
            # The next row overwrites the scratch.
            tl.debug_barrier()

    policy = tl.sum(b_policy, 0)
    if p_is is not None:
        policy = tl.sum(b_is_policy, 0)
    store_partials(
        p_partials + i_p * FIELDS,
        policy,
        tl.sum(b_kl, 0),
        tl.sum(b_entropy, 0),
        tl.sum(b_ratios, 0),
        smallest(b_min),
        largest(b_max),
        tl.sum(b_low, 0),
        tl.sum(b_high, 0),
        tl.sum(b_clipped_tokens, 0),
        tl.sum(b_z_all, 0),
        tl.sum(b_k3, 0),
        tl.sum(b_dead, 0) + tl.sum(b_dead_tokens.to(tl.int64), 0),
        steps,
        tl.sum(b_tokens, 0),
        trajectories,
    )


def policy_loss_masked(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    ref_log_probs: Tensor | None,
    entropy: Tensor | None,
    is_weights: Tensor | None,
    mask: Tensor,
    row_length: int,
    ratio_center: Tensor | None,
    normalizer: Tensor | None,
    ratio: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    log_ratio_max: float,
    reduction: int,
    kl_coef: float,
    kl_estimator: int,
    entropy_coef: float,
    need_grad: bool,
    need_entropy_grad: bool,
) -> tuple[Tensor, ...]:
    """Return loss, metrics, gradients and their scale: see `operators.policy_loss_masked`."""
    num_rows = log_probs.numel() // max(row_length, 1)
    num_programs = programs(num_rows)
    max_runs = row_length // 2 + 1
    block = row_block(row_length)
    mask = mask.contiguous().view(torch.uint8)
    grad, grad_entropy = new_gradients(log_probs, need_grad, need_entropy_grad)
    partials = new_partials(log_probs, num_programs)
    runs = log_probs.new_empty((num_programs * 3 * max_runs,), dtype=torch.float64)
    with device_guard(log_probs):
        p_center, center, num_centers = find_center(
            log_probs, old_log_probs, None, mask, ratio_center, ratio
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
            1.0 - clip_low,
            1.0 + clip_high,
            dual_clip,
            log_ratio_max,
            kl_coef,
            entropy_coef,
            NUM_CENTERS=num_centers,
            RATIO=ratio,
            REDUCTION=reduction,
            KL=kl_estimator,
            TOKEN_PASS=needs_token_pass(grad, grad_entropy, ref_log_probs, entropy, is_weights),
            ALIGNED=aligned(row_length),
            BR=min(block, 128),
            BT=block,
            **threads(block),
        )
        loss, metrics, scale = finish(
            log_probs, partials, normalizer, reduction, kl_coef, entropy_coef
        )
    return (
        loss,
        metrics,
        or_empty(grad, log_probs),
        or_empty(grad_entropy, log_probs),
        scale,
    )
