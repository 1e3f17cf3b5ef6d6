"""The step objective and its gradient coefficients; the kernel here takes a layout.

    total = sum_s w_s mean_i (w_i l(x_i, A_i) + kl_coef KL_i - entropy_coef H_i) / normalizer
    d total / d log pi_i = w_s (w_i s_i L_s^-p + kl_coef / L_s dKL_i) / normalizer

The log-ratios x, the surrogate l and its slope s = dl / dx are in `step_math.py`. In the kernel
here a step has one x and one A, and so one l and one s; `policy_loss_by_token.py` has the other.
The normalizer is known last: gradients are written without it, and the finishing kernel leaves
1 / normalizer besides.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ...config import KernelConfig
from ..records import Steps, record
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
from .policy_loss_by_token import policy_loss_by_token_kernel
from .policy_loss_masked import policy_loss_masked
from .policy_steps import (
    bitten,
    log_ratio_sums,
    step_block,
    step_limits,
    step_weights,
    tokens_at,
    write_tokens,
    zero_masked,
)
from .policy_sums import (
    FIELDS,
    extremes,
    find_center,
    finish,
    fixed_limits,
    largest,
    needs_token_pass,
    new_gradients,
    new_partials,
    read_center,
    smallest,
    store_partials,
)
from .step_math import TOKEN, TRAJECTORY_MEAN, pool, surrogate, times

# `operators.launcher` looks for both here.
__all__ = ["policy_loss", "policy_loss_masked"]


@triton.jit(do_not_specialize=["num_steps", "num_actions", "num_tokens", "step_programs"])
def policy_loss_kernel(
    p_new,
    p_old,
    p_adv,
    p_ref,
    p_entropy,
    p_is,
    p_weights,
    p_clip_low,
    p_clip_high,
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
    IS_PER_TOKEN: tl.constexpr,
    TOKEN_CLIP: tl.constexpr,
    TOKEN_PASS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BS: tl.constexpr,
    BT: tl.constexpr,
    BZ: tl.constexpr,
):
    """Programs before `step_programs` take blocks of BS steps, the others zero masked tokens."""
    i_p = tl.program_id(0).to(tl.int64)
    if i_p >= step_programs:
        zero_masked(
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

        for i_block in range(i_p, tl.cdiv(num_steps, BS), step_programs):
            b_s, m_s, b_begin, b_len, m_step, b_inverse = step_block(
                p_offsets, i_block, num_steps, BS
            )
            longest = tl.max(b_len, 0)
            b_pooled, b_sum, b_k3 = log_ratio_sums(
                p_new,
                p_old,
                p_adv,
                p_index,
                b_s,
                b_begin,
                b_len,
                longest,
                token_low,
                token_high,
                False,
                TOKEN_CLIP,
                BS,
                BT,
            )
            b_log_ratio, b_scale = pool(b_pooled, b_len, b_inverse, mu, RATIO)
            tl.store(p_log_ratio + b_s, b_log_ratio, mask=m_s)
            b_floor, b_ceiling = step_limits(
                p_clip_low, p_clip_high, low, high, b_s, m_step, SURROGATE, BS
            )
            b_adv = tl.load(p_adv + b_s, mask=m_step, other=0.0)
            b_ratio, b_loss, b_slope, m_clipped, m_below = surrogate(
                b_log_ratio,
                b_log_ratio,
                b_adv.to(tl.float64),
                b_floor,
                b_ceiling,
                dual_clip,
                soft_positive,
                soft_negative,
                log_ratio_max,
                SURROGATE,
            )
            b_ratios += tl.where(m_step, b_ratio, 0.0)
            b_min, b_max = extremes(b_min, b_max, b_ratio, m_step)
            m_clipped = m_clipped & m_step
            b_low += (m_clipped & m_below).to(tl.int32)
            b_high += (m_clipped & ~m_below).to(tl.int32)
            b_clipped_tokens += tl.where(m_clipped, b_len, 0)
            b_z_all += b_sum
            b_k3_all += b_k3
            b_steps += m_step.to(tl.int32)

            b_w, b_share = step_weights(p_weights, p_counts, b_s, b_len, m_step, REDUCTION)
            if REDUCTION == TRAJECTORY_MEAN:
                b_trajectories += b_share
            # w_s / L_s, the weight of a token in the means over the step.
            b_unit = b_w * b_inverse
            b_kl_unit = times(kl_coef, b_unit)
            b_entropy_unit = times(entropy_coef, b_unit)
            b_slope = times(b_slope * b_scale, b_w)
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
                    b_pos, m_token = tokens_at(p_index, b_begin, b_len, t, BT)
                    b_grad = tl.broadcast_to(b_slope[:, None], [BS, BT])
                    if p_is is not None and IS_PER_TOKEN:
                        b_is = tl.load(p_is + b_pos, mask=m_token, other=0.0).to(tl.float64)
                        b_is_sum += b_is
                        b_grad = times(b_grad, b_is)
                    if TOKEN_CLIP:
                        m_bitten = bitten(
                            p_new, p_old, b_adv[:, None], b_pos, m_token, token_low, token_high
                        )
                        b_grad = tl.where(m_bitten, 0.0, b_grad)
                    b_kl_sum, b_entropy_sum, b_dead_sum = write_tokens(
                        p_new,
                        p_ref,
                        p_entropy,
                        p_grad,
                        p_grad_entropy,
                        b_pos,
                        m_token,
                        b_grad,
                        b_kl_unit,
                        b_entropy_unit,
                        b_kl_sum,
                        b_entropy_sum,
                        b_dead_sum,
                        KL,
                        BS,
                        BT,
                    )
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
    entropy: Tensor | None,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    ref_log_probs: Tensor | None,
    is_weights: Tensor | None,
    step_weights: Tensor | None,
    clip_low: Tensor | None,
    clip_high: Tensor | None,
    ratio_center: Tensor | None,
    normalizer: Tensor | None,
    steps: Sequence[Tensor],
    config: Sequence[float],
    advantages_per_token: bool,
    is_weights_per_token: bool,
    need_grad: bool,
    need_entropy_grad: bool,
) -> tuple[Tensor | None, ...]:
    """Return loss, metrics, step log-ratios and gradients: see `operators.policy_loss`."""
    of, c = record(Steps, steps), KernelConfig(*config)
    num_steps, num_actions = of.step_offsets.numel() - 1, of.token_index.numel()
    num_tokens = log_probs.numel()
    block_steps, block_tokens = step_tile(num_actions, num_steps)
    step_programs = programs(cdiv(num_steps, block_steps))
    zero_programs = cdiv(num_tokens, FLAT_BLOCK) if need_grad or need_entropy_grad else 0
    step_log_ratio = log_probs.new_empty((num_steps,))
    grad, grad_entropy = new_gradients(log_probs, need_grad, need_entropy_grad)
    partials = new_partials(log_probs, step_programs)
    # On-policy, z is 0 and no clamp bites.
    clips_tokens = c.clips_tokens and old_log_probs is not None
    choices: dict[str, bool] = {}
    if advantages_per_token or int(c.ratio) == TOKEN.value:
        kernel = policy_loss_by_token_kernel
        choices["ADV_PER_TOKEN"] = advantages_per_token
    else:
        kernel = policy_loss_kernel
        choices["TOKEN_PASS"] = clips_tokens or needs_token_pass(
            grad,
            grad_entropy,
            ref_log_probs,
            entropy,
            is_weights if is_weights_per_token else None,
        )
    with device_guard(log_probs):
        p_center, center, num_centers = find_center(
            log_probs,
            old_log_probs,
            advantages,
            of.step_ids,
            of.token_index,
            None,
            ratio_center,
            c,
            advantages_per_token,
        )
        kernel[(step_programs + min(zero_programs, 8 * MAX_PROGRAMS),)](
            log_probs,
            old_log_probs,
            advantages,
            ref_log_probs,
            entropy,
            is_weights,
            step_weights,
            clip_low,
            clip_high,
            of.step_ids,
            of.token_index,
            of.step_offsets,
            of.trajectory_counts,
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
            IS_PER_TOKEN=is_weights_per_token,
            TOKEN_CLIP=clips_tokens,
            ALIGNED=aligned(num_tokens),
            BS=block_steps,
            BT=block_tokens,
            BZ=FLAT_BLOCK,
            **choices,
            **threads(STEP_THREADS, 1),
            **all_registers(),
        )
        loss, metrics, scale = finish(log_probs, partials, normalizer, c)
    return loss, metrics, step_log_ratio, grad, grad_entropy, scale
