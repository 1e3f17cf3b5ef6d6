"""The policy loss on a layout whose tokens have ratios or advantages of their own.

The formulas stand in `policy_loss.py`. Where the ratio is each token's own, the surrogate is taken
of every token. Otherwise the log-ratio of a step is pooled, the surrogate is taken of both signs of
an advantage, and every token picks its own.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .policy_steps import (
    bitten,
    log_probs_at,
    log_ratio_sums,
    step_block,
    step_limits,
    step_weights,
    tokens_at,
    write_tokens,
    zero_masked,
)
from .policy_sums import FIELDS, extremes, largest, read_center, smallest, store_partials
from .step_math import (
    TOKEN,
    TRAJECTORY_MEAN,
    TV,
    kl_k3,
    of_advantage,
    pool,
    probability_gap,
    signed_surrogates,
    surrogate,
    times,
)


@triton.jit(do_not_specialize=["num_steps", "num_actions", "num_tokens", "step_programs"])
def policy_loss_by_token_kernel(
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
    ADV_PER_TOKEN: tl.constexpr,
    IS_PER_TOKEN: tl.constexpr,
    TOKEN_CLIP: tl.constexpr,
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
        b_low = tl.zeros([BS], tl.float64)
        b_high = tl.zeros([BS], tl.float64)
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
            b_floor, b_ceiling = step_limits(
                p_clip_low, p_clip_high, low, high, b_s, m_step, SURROGATE, BS
            )
            if RATIO == TOKEN:
                b_scale = b_inverse
            else:
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
                    ADV_PER_TOKEN,
                    TOKEN_CLIP,
                    BS,
                    BT,
                )
                b_log_ratio, b_scale = pool(b_pooled, b_len, b_inverse, mu, RATIO)
                (
                    b_ratio,
                    b_value_positive,
                    b_slope_positive,
                    m_clipped_positive,
                    b_value_negative,
                    b_slope_negative,
                    m_clipped_negative,
                ) = signed_surrogates(
                    b_log_ratio,
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
            b_w, b_share = step_weights(p_weights, p_counts, b_s, b_len, m_step, REDUCTION)
            if REDUCTION == TRAJECTORY_MEAN:
                b_trajectories += b_share
            b_steps += m_step.to(tl.int32)
            # w_s / L_s, the weight of a token in the means over the step.
            b_unit = b_w * b_inverse
            b_kl_unit = times(kl_coef, b_unit)
            b_entropy_unit = times(entropy_coef, b_unit)
            if p_is is not None and not IS_PER_TOKEN:
                b_step_is = tl.load(p_is + b_s, mask=m_step, other=0.0).to(tl.float64)

            if not ADV_PER_TOKEN:
                b_adv = tl.load(p_adv + b_s, mask=m_step, other=0.0)[:, None]
            b_loss_sum = tl.zeros([BS, BT], tl.float64)
            b_low_sum = tl.zeros([BS, BT], tl.int32)
            b_high_sum = tl.zeros([BS, BT], tl.int32)
            b_kl_sum = tl.zeros([BS, BT], tl.float64)
            b_entropy_sum = tl.zeros([BS, BT], tl.float64)
            b_dead_sum = tl.zeros([BS, BT], tl.int32)
            b_z_sum = tl.zeros([BS, BT], tl.float64)
            b_k3_sum = tl.zeros([BS, BT], tl.float64)
            b_ratio_sum = tl.zeros([BS, BT], tl.float64)
            b_least = tl.full([BS, BT], float("inf"), p_new.dtype.element_ty)
            b_most = tl.full([BS, BT], float("-inf"), p_new.dtype.element_ty)
            for t in range(0, longest, BT):
                b_pos, m_token = tokens_at(p_index, b_begin, b_len, t, BT)
                if ADV_PER_TOKEN:
                    b_adv = tl.load(p_adv + b_pos, mask=m_token, other=0.0)
                if RATIO == TOKEN:
                    b_new, b_old = log_probs_at(p_new, p_old, b_pos, m_token)
                    b_x = b_new - b_old
                    b_z_sum += b_x.to(tl.float64)
                    b_k3_sum += kl_k3(b_x).to(tl.float64)
                    b_gap = probability_gap(b_new, b_old) if SURROGATE == TV else b_x
                    b_rho, b_value, b_slope, m_clipped, m_below = surrogate(
                        b_x,
                        b_gap,
                        b_adv,
                        b_floor[:, None],
                        b_ceiling[:, None],
                        dual_clip,
                        soft_positive,
                        soft_negative,
                        log_ratio_max,
                        SURROGATE,
                    )
                    b_ratio_sum += tl.where(m_token, b_rho, 0.0).to(tl.float64)
                    b_least, b_most = extremes(b_least, b_most, b_rho, m_token)
                else:
                    m_negative = b_adv < 0
                    b_value, b_slope, m_clipped = of_advantage(
                        b_adv,
                        tl.where(m_negative, b_value_negative[:, None], b_value_positive[:, None]),
                        tl.where(m_negative, b_slope_negative[:, None], b_slope_positive[:, None]),
                        (m_negative & m_clipped_negative[:, None])
                        | (~m_negative & m_clipped_positive[:, None]),
                        SURROGATE,
                    )
                    m_below = (b_ratio < 1)[:, None]
                b_low_sum += (m_token & m_clipped & m_below).to(tl.int32)
                b_high_sum += (m_token & m_clipped & ~m_below).to(tl.int32)
                b_loss = b_value.to(tl.float64)
                b_grad = times(b_slope.to(tl.float64) * b_scale[:, None], b_w[:, None])
                if p_is is not None and not IS_PER_TOKEN:
                    b_grad = times(b_grad, b_step_is[:, None])
                if p_is is not None and IS_PER_TOKEN:
                    b_is = tl.load(p_is + b_pos, mask=m_token, other=0.0).to(tl.float64)
                    b_loss = b_loss * b_is
                    b_grad = times(b_grad, b_is)
                b_loss_sum += tl.where(m_token, b_loss, 0.0)
                if TOKEN_CLIP:
                    m_bitten = bitten(p_new, p_old, b_adv, b_pos, m_token, token_low, token_high)
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

            if RATIO == TOKEN:
                b_sum = tl.sum(b_z_sum, 1)
                b_k3 = tl.sum(b_k3_sum, 1)
                b_log_ratio = b_sum * b_inverse
                b_ratios += tl.sum(b_ratio_sum, 1) * b_inverse
                b_min, _ = extremes(b_min, b_max, smallest(b_least, 1).to(tl.float64), m_step)
                _, b_max = extremes(b_min, b_max, largest(b_most, 1).to(tl.float64), m_step)
            tl.store(p_log_ratio + b_s, b_log_ratio, mask=m_s)
            b_z_all += b_sum
            b_k3_all += b_k3
            b_low_tokens, b_high_tokens = tl.sum(b_low_sum, 1), tl.sum(b_high_sum, 1)
            b_low += b_low_tokens.to(tl.float64) * b_inverse
            b_high += b_high_tokens.to(tl.float64) * b_inverse
            b_clipped_tokens += (b_low_tokens + b_high_tokens).to(tl.int64)
            b_dead += tl.sum(b_dead_sum.to(tl.int64), 1)
            b_kl += b_unit * tl.sum(b_kl_sum, 1)
            b_entropy += b_unit * tl.sum(b_entropy_sum, 1)
            b_loss = tl.sum(b_loss_sum, 1) * b_inverse
            if p_is is not None and not IS_PER_TOKEN:
                b_loss = b_loss * b_step_is
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
