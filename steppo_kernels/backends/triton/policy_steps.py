"""What the kernels of the policy loss on a layout share: blocks of steps, passes over tokens."""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .step_math import TOKEN_MEAN, TRAJECTORY_MEAN, clip_tokens, kl_k3, kl_terms, limits, times
from .tiles import chunk


@triton.jit
def zero_masked(
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


@triton.jit
def step_block(p_offsets, i_block, num_steps, BS: tl.constexpr):
    """Return a block of steps: numbers, which of them exist, begins, lengths, which have tokens.

    The last is 1 / length, or 1 for no token.
    """
    b_s = i_block * BS + tl.arange(0, BS)
    m_s = b_s < num_steps
    b_begin = tl.load(p_offsets + b_s, mask=m_s, other=0)
    b_len = tl.load(p_offsets + b_s + 1, mask=m_s, other=0) - b_begin
    m_step = b_len > 0
    return b_s, m_s, b_begin, b_len, m_step, 1.0 / tl.where(m_step, b_len, 1).to(tl.float64)


@triton.jit
def step_weights(p_weights, p_counts, b_s, b_len, m_step, REDUCTION: tl.constexpr):
    """Return w_s, and what a step is of its trajectory, in fp64."""
    b_share = tl.where(m_step, 1.0, 0.0).to(tl.float64)
    if REDUCTION == TRAJECTORY_MEAN:
        b_count = tl.load(p_counts + b_s, mask=m_step, other=1)
        b_share = b_share / tl.where(b_count > 1, b_count, 1).to(tl.float64)
    b_w = b_share
    if p_weights is not None:
        b_w = tl.load(p_weights + b_s, mask=m_step, other=0.0).to(tl.float64)
    elif REDUCTION == TOKEN_MEAN:
        b_w = b_len.to(tl.float64)
    return b_w, b_share


@triton.jit
def step_limits(
    p_clip_low,
    p_clip_high,
    low,
    high,
    b_s,
    m_step,
    SURROGATE: tl.constexpr,
    BS: tl.constexpr,
):
    """Return the limits of steps: their own, or those that are configured."""
    b_low = tl.full([BS], low, tl.float64)
    b_high = tl.full([BS], high, tl.float64)
    if p_clip_low is not None:
        b_own = tl.load(p_clip_low + b_s, mask=m_step, other=0.0).to(tl.float64)
        b_low, _ = limits(b_own, b_own, SURROGATE)
    if p_clip_high is not None:
        b_own = tl.load(p_clip_high + b_s, mask=m_step, other=0.0).to(tl.float64)
        _, b_high = limits(b_own, b_own, SURROGATE)
    return b_low, b_high


@triton.jit
def tokens_at(p_index, b_begin, b_len, t, BT: tl.constexpr):
    """Return the flat positions of the tokens of steps from the t-th on, and which there are."""
    b_lane = tl.arange(0, BT)[None, :]
    m_token = t + b_lane < b_len[:, None]
    return tl.load(p_index + t + b_begin[:, None] + b_lane, mask=m_token, other=0), m_token


@triton.jit
def log_probs_at(p_new, p_old, b_pos, m_token):
    """Return new and old log-probs of tokens; on-policy the old ones are the new ones."""
    b_new = tl.load(p_new + b_pos, mask=m_token, other=0.0)
    b_old = b_new
    if p_old is not None:
        b_old = tl.load(p_old + b_pos, mask=m_token, other=0.0)
    return b_new, b_old


@triton.jit
def bitten(p_new, p_old, b_adv, b_pos, m_token, token_low, token_high):
    """Return the tokens whose log-ratios `token_clip` clamps."""
    b_new, b_old = log_probs_at(p_new, p_old, b_pos, m_token)
    b_z = b_new.to(tl.float64) - b_old.to(tl.float64)
    _, m_bitten = clip_tokens(b_z, b_adv, token_low, token_high)
    return m_bitten


@triton.jit
def log_ratio_sums(
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
    ADV_PER_TOKEN: tl.constexpr,
    TOKEN_CLIP: tl.constexpr,
    BS: tl.constexpr,
    BT: tl.constexpr,
):
    """Return of each step sum z as it is pooled, sum z, and sum k3."""
    b_z_sum = tl.zeros([BS, BT], tl.float64)
    b_k3_sum = tl.zeros([BS, BT], tl.float64)
    b_pooled_sum = tl.zeros([BS, BT], tl.float64)
    if TOKEN_CLIP and not ADV_PER_TOKEN:
        b_adv = tl.load(p_adv + b_s, mask=b_len > 0, other=0.0)[:, None]
    for t in range(0, longest, BT):
        b_pos, m_token = tokens_at(p_index, b_begin, b_len, t, BT)
        b_new, b_old = log_probs_at(p_new, p_old, b_pos, m_token)
        b_z = b_new.to(tl.float64) - b_old.to(tl.float64)
        b_z_sum += b_z
        b_k3_sum += kl_k3(b_z.to(b_new.dtype)).to(tl.float64)
        if TOKEN_CLIP:
            if ADV_PER_TOKEN:
                b_adv = tl.load(p_adv + b_pos, mask=m_token, other=0.0)
            b_z, _ = clip_tokens(b_z, b_adv, token_low, token_high)
            b_pooled_sum += b_z
    b_sum = tl.sum(b_z_sum, 1)
    b_pooled = tl.sum(b_pooled_sum, 1) if TOKEN_CLIP else b_sum
    return b_pooled, b_sum, tl.sum(b_k3_sum, 1)


@triton.jit
def write_tokens(
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
    KL: tl.constexpr,
    BS: tl.constexpr,
    BT: tl.constexpr,
):
    """Write the gradients of tokens from that of the policy, `b_grad`.

    Returned are the sums of KL, entropy and dead tokens with these tokens in them. The units are
    the coefficients of a step's tokens.
    """
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
    return b_kl_sum, b_entropy_sum, b_dead_sum
