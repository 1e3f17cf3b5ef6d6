"""The clipped step objective and its gradient coefficients; the kernel here takes a layout.

    total = sum_s w_s (l_s + kl_coef mean_i KL_i - entropy_coef mean_i H_i) / normalizer
    d total / d log pi_i = w_s (-A_s rho_s L_s^-p w_i + kl_coef / L_s dKL_i) / normalizer

The l_s, rho_s and their slope are in `step_math.py`. The normalizer is known last: gradients are
written without it, and the finishing kernel returns 1 / normalizer next to the loss.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    FLAT_BLOCK,
    MAX_PROGRAMS,
    STEP_THREADS,
    aligned,
    all_registers,
    cdiv,
    device_guard,
    programs,
    step_tile,
    threads,
)
from .policy_loss_masked import policy_loss_masked
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
from .tiles import chunk

# `operators.launcher` looks for both here.
__all__ = ["policy_loss", "policy_loss_masked"]


@triton.jit
def _zero_masked(
    p_step_ids,
    p_grad,
    p_grad_entropy,
    i_p,
    num_programs,
    num_tokens,
    ALIGNED: tl.constexpr,
    BT: tl.constexpr,
):
    """Write 0 as the gradient of every token without a step."""
    length = num_tokens.to(tl.int64)
    for i_block in range(i_p, tl.cdiv(length, BT), num_programs):
        i_flat, b_lane, m_token = chunk(0, i_block * BT, length, ALIGNED, BT)
        b_step = tl.load(p_step_ids + i_flat + b_lane, mask=m_token, other=0)
        m_masked = m_token & (b_step < 0)
        if p_grad is not None:
            b_zero = tl.zeros([BT], p_grad.dtype.element_ty)
            tl.store(p_grad + i_flat + b_lane, b_zero, mask=m_masked)
        if p_grad_entropy is not None:
            b_zero = tl.zeros([BT], p_grad_entropy.dtype.element_ty)
            tl.store(p_grad_entropy + i_flat + b_lane, b_zero, mask=m_masked)


@triton.jit(do_not_specialize=["num_steps", "num_actions", "num_tokens", "step_programs"])
def policy_loss_kernel(
    p_new,
    p_old,
    p_adv,
    p_ref,
    p_entropy,
    p_is,
    p_weights,
    p_step_ids,
    p_index,
    p_offsets,
    p_counts,
    p_center,
    p_log_ratio,
    p_grad,
    p_grad_entropy,
    p_partials,
    num_steps,
    num_actions,
    num_tokens,
    step_programs,
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
    ADV_PER_TOKEN: tl.constexpr,
    IS_PER_TOKEN: tl.constexpr,
    TOKEN_PASS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BS: tl.constexpr,
    BT: tl.constexpr,
    BZ: tl.constexpr,
):
    """Programs before `step_programs` take blocks of BS steps, the others zero masked tokens."""
    i_p = tl.program_id(0).to(tl.int64)
    if i_p >= step_programs:
        _zero_masked(
            p_step_ids,
            p_grad,
            p_grad_entropy,
            i_p - step_programs,
            tl.num_programs(0) - step_programs,
            num_tokens,
            ALIGNED,
            BZ,
        )
    else:
        mu = read_center(p_center, center, NUM_CENTERS)
        b_policy = tl.zeros([BS], tl.float64)
        b_kl = tl.zeros([BS], tl.float64)
        b_entropy = tl.zeros([BS], tl.float64)
        b_ratios = tl.zeros([BS], tl.float64)
        b_min = tl.full([BS], float("inf"), tl.float64)
        b_max = tl.full([BS], float("-inf"), tl.float64)
        b_low = tl.zeros([BS], tl.int32)
        b_high = tl.zeros([BS], tl.int32)
        b_clipped_tokens = tl.zeros([BS], tl.int64)
        b_z_all = tl.zeros([BS], tl.float64)
        b_k3_all = tl.zeros([BS], tl.float64)
        b_dead = tl.zeros([BS], tl.int64)
        b_steps = tl.zeros([BS], tl.int32)
        b_trajectories = tl.zeros([BS], tl.float64)
        b_lane = tl.arange(0, BT)[None, :]

        for i_block in range(i_p, tl.cdiv(num_steps, BS), step_programs):
            b_s = i_block * BS + tl.arange(0, BS)
            m_s = b_s < num_steps
            b_begin = tl.load(p_offsets + b_s, mask=m_s, other=0)
            b_len = tl.load(p_offsets + b_s + 1, mask=m_s, other=0) - b_begin
            longest = tl.max(b_len, 0)

            b_z_sum = tl.zeros([BS, BT], tl.float64)
            b_k3_sum = tl.zeros([BS, BT], tl.float64)
            for t in range(0, longest, BT):
                m_token = t + b_lane < b_len[:, None]
                p_pos = p_index + t + b_begin[:, None] + b_lane
                b_pos = tl.load(p_pos, mask=m_token, other=0)
                b_new = tl.load(p_new + b_pos, mask=m_token, other=0.0)
                b_old = b_new
                if p_old is not None:
                    b_old = tl.load(p_old + b_pos, mask=m_token, other=0.0)
                b_z = b_new.to(tl.float64) - b_old.to(tl.float64)
                b_z_sum += b_z
                b_k3_sum += kl_k3(b_z.to(b_new.dtype)).to(tl.float64)

            m_step = b_len > 0
            b_first = b_s
            if ADV_PER_TOKEN:
                b_first = tl.load(p_index + b_begin, mask=m_step, other=0)
            b_adv = tl.load(p_adv + b_first, mask=m_step, other=0.0).to(tl.float64)
            b_sum = tl.sum(b_z_sum, 1)
            b_inverse = 1.0 / tl.where(m_step, b_len, 1).to(tl.float64)
            b_log_ratio, b_ratio, b_loss, b_slope, m_clipped = step_terms(
                b_sum, b_len, b_inverse, b_adv, mu, low, high, dual_clip, log_ratio_max, RATIO
            )
            tl.store(p_log_ratio + b_s, b_log_ratio, mask=m_s)
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
            b_k3_all += tl.sum(b_k3_sum, 1)
            b_steps += m_step.to(tl.int32)

            b_share = tl.where(m_step, 1.0, 0.0).to(tl.float64)
            if REDUCTION == TRAJECTORY_MEAN:
                b_count = tl.load(p_counts + b_s, mask=m_step, other=1)
                b_share = b_share / tl.where(b_count > 1, b_count, 1).to(tl.float64)
                b_trajectories += b_share
            b_w = b_share
            if p_weights is not None:
                b_w = tl.load(p_weights + b_s, mask=m_step, other=0.0).to(tl.float64)
            elif REDUCTION == TOKEN_MEAN:
                b_w = b_len.to(tl.float64)
            # w_s / L_s, the weight of a token in the means over the step.
            b_unit = b_w * b_inverse
            b_kl_unit = times(kl_coef, b_unit)
            b_entropy_unit = times(entropy_coef, b_unit)
            b_slope = times(b_slope, b_w)
            if p_is is not None and not IS_PER_TOKEN:
                b_step_is = tl.load(p_is + b_s, mask=m_step, other=0.0).to(tl.float64)
                b_loss = b_loss * b_step_is
                b_slope = times(b_slope, b_step_is)

            if TOKEN_PASS:
                b_is_sum = tl.zeros([BS, BT], tl.float64)
                b_kl_sum = tl.zeros([BS, BT], tl.float64)
                b_entropy_sum = tl.zeros([BS, BT], tl.float64)
                b_dead_sum = tl.zeros([BS, BT], tl.int32)
                for t in range(0, longest, BT):
                    m_token = t + b_lane < b_len[:, None]
                    p_pos = p_index + t + b_begin[:, None] + b_lane
                    b_pos = tl.load(p_pos, mask=m_token, other=0)
                    b_grad = tl.broadcast_to(b_slope[:, None], [BS, BT])
                    if p_is is not None and IS_PER_TOKEN:
                        b_is = tl.load(p_is + b_pos, mask=m_token, other=0.0).to(tl.float64)
                        b_is_sum += b_is
                        b_grad = times(b_grad, b_is)
                    m_dead = m_token & (b_grad == 0)
                    if p_ref is not None:
                        b_new = tl.load(p_new + b_pos, mask=m_token, other=0.0)
                        b_ref = tl.load(p_ref + b_pos, mask=m_token, other=0.0)
                        b_value, b_kl_slope = kl_terms(b_ref - b_new, KL)
                        b_kl_sum += b_value.to(tl.float64)
                        b_grad += times(b_kl_unit[:, None], b_kl_slope.to(tl.float64))
                        m_dead = m_token & (b_grad == 0)
                    if p_entropy is not None:
                        b_h = tl.load(p_entropy + b_pos, mask=m_token, other=0.0)
                        b_entropy_sum += b_h.to(tl.float64)
                        m_dead = m_dead & (b_entropy_unit == 0)[:, None]
                    b_dead_sum += m_dead.to(tl.int32)
                    if p_grad is not None:
                        tl.store(p_grad + b_pos, b_grad, mask=m_token)
                    if p_grad_entropy is not None:
                        b_bonus = tl.broadcast_to(-b_entropy_unit[:, None], [BS, BT])
                        tl.store(p_grad_entropy + b_pos, b_bonus, mask=m_token)
                b_dead += tl.sum(b_dead_sum.to(tl.int64), 1)
                b_kl += b_unit * tl.sum(b_kl_sum, 1)
                b_entropy += b_unit * tl.sum(b_entropy_sum, 1)
                if p_is is not None and IS_PER_TOKEN:
                    b_loss = b_loss * tl.sum(b_is_sum, 1) * b_inverse
            else:
                b_dead += tl.where(b_slope == 0, b_len, 0)

            b_policy += tl.where(m_step, b_w * b_loss, 0.0)

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
            tl.sum(b_clipped_tokens, 0),
            tl.sum(b_z_all, 0),
            tl.sum(b_k3_all, 0),
            tl.sum(b_dead, 0),
            tl.sum(b_steps, 0),
            tl.where(i_p == 0, num_actions, 0),
            tl.sum(b_trajectories, 0),
        )


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    ref_log_probs: Tensor | None,
    entropy: Tensor | None,
    is_weights: Tensor | None,
    step_weights: Tensor | None,
    advantages_per_token: bool,
    is_weights_per_token: bool,
    step_ids: Tensor,
    token_index: Tensor,
    step_offsets: Tensor,
    trajectory_counts: Tensor,
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
    """Return loss, metrics, step log-ratios, gradients and their scale.

    See `operators.policy_loss`.
    """
    num_steps, num_actions = step_offsets.numel() - 1, token_index.numel()
    num_tokens = log_probs.numel()
    block_steps, block_tokens = step_tile(num_actions, num_steps)
    step_programs = programs(cdiv(num_steps, block_steps))
    zero_programs = cdiv(num_tokens, FLAT_BLOCK) if need_grad or need_entropy_grad else 0
    step_log_ratio = log_probs.new_empty((num_steps,))
    grad, grad_entropy = new_gradients(log_probs, need_grad, need_entropy_grad)
    partials = new_partials(log_probs, step_programs)
    with device_guard(log_probs):
        p_center, center, num_centers = find_center(
            log_probs, old_log_probs, token_index, None, ratio_center, ratio
        )
        policy_loss_kernel[(step_programs + min(zero_programs, 8 * MAX_PROGRAMS),)](
            log_probs,
            old_log_probs,
            advantages,
            ref_log_probs,
            entropy,
            is_weights,
            step_weights,
            step_ids,
            token_index,
            step_offsets,
            trajectory_counts,
            p_center,
            step_log_ratio,
            grad,
            grad_entropy,
            partials,
            num_steps,
            num_actions,
            num_tokens,
            step_programs,
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
            ADV_PER_TOKEN=advantages_per_token,
            IS_PER_TOKEN=is_weights_per_token,
            TOKEN_PASS=needs_token_pass(
                grad,
                grad_entropy,
                ref_log_probs,
                entropy,
                is_weights if is_weights_per_token else None,
            ),
            ALIGNED=aligned(num_tokens),
            BS=block_steps,
            BT=block_tokens,
            BZ=FLAT_BLOCK,
            **threads(STEP_THREADS, 1),
            **all_registers(),
        )
        loss, metrics, scale = finish(
            log_probs, partials, normalizer, reduction, kl_coef, entropy_coef
        )
    return (
        loss,
        metrics,
        step_log_ratio,
        or_empty(grad, log_probs),
        or_empty(grad_entropy, log_probs),
        scale,
    )
