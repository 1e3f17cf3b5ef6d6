"""What the two forms of the policy loss share: mu, sums over steps, the kernel that finishes."""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import KernelConfig
from ...outputs import NUM_POLICY_METRICS, POLICY_METRICS
from .launch import FLAT_BLOCK, aligned, all_registers, scalar, threads
from .step_math import CENTERED, QUADRATIC, SOFT, TV, clip_tokens, denominator
from .tiles import chunk

# Partial sums of one program. The extremes of the ratio are not summed.
FIELDS = tl.constexpr(16)
_RATIO_MIN = tl.constexpr(4)
_RATIO_MAX = tl.constexpr(5)
# Entries of the metrics behind those that are shown.
_DENOMINATOR = tl.constexpr(len(POLICY_METRICS))

# Programs of the kernel that computes mu: every program of the next one adds up all of them.
_CENTER_PROGRAMS = 256


@triton.jit(do_not_specialize=["num_tokens"])
def log_ratio_sum_kernel(
    p_new,
    p_old,
    p_adv,
    p_step_ids,
    p_index,
    p_mask,
    p_partials,
    num_tokens,
    token_low: tl.float64,
    token_high: tl.float64,
    ADV_PER_TOKEN: tl.constexpr,
    TOKEN_CLIP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BT: tl.constexpr,
):
    """Add up z and the number of tokens, of the tokens in `p_index` or of those in `p_mask`."""
    i_p = tl.program_id(0).to(tl.int64)
    length = num_tokens.to(tl.int64)
    total = tl.full((), 0.0, tl.float64)
    count = tl.full((), 0, tl.int64)
    for i_block in range(i_p, tl.cdiv(length, BT), tl.num_programs(0)):
        i_flat, b_lane, m_token = chunk(0, i_block * BT, length, ALIGNED, BT)
        if p_index is not None:
            b_pos = tl.load(p_index + i_flat + b_lane, mask=m_token, other=0)
            b_new = tl.load(p_new + b_pos, mask=m_token, other=0.0)
            b_old = tl.load(p_old + b_pos, mask=m_token, other=0.0)
        else:
            b_pos = i_flat + b_lane
            b_new = tl.load(p_new + b_pos, mask=m_token, other=0.0)
            b_old = tl.load(p_old + b_pos, mask=m_token, other=0.0)
            m_token = tl.load(p_mask + b_pos, mask=m_token, other=0) != 0
            b_new = tl.where(m_token, b_new, 0.0)
            b_old = tl.where(m_token, b_old, 0.0)
        b_z = b_new.to(tl.float64) - b_old.to(tl.float64)
        if TOKEN_CLIP:
            b_at = b_pos
            if not ADV_PER_TOKEN:
                b_at = tl.load(p_step_ids + b_pos, mask=m_token, other=0)
            b_adv = tl.load(p_adv + b_at, mask=m_token, other=0.0)
            b_z, _ = clip_tokens(b_z, b_adv, token_low, token_high)
        total += tl.sum(b_z, 0)
        count += tl.sum(m_token.to(tl.int64), 0)
    tl.store(p_partials + 2 * i_p, total)
    tl.store(p_partials + 2 * i_p + 1, count.to(tl.float64))


@triton.jit
def read_center(p_center, center, num_partials: tl.constexpr):
    """Return mu: the number given, the one at `p_center`, or the mean of its partial sums."""
    if num_partials > 0:
        b_i = tl.arange(0, num_partials)
        total = tl.sum(tl.load(p_center + 2 * b_i), 0)
        count = tl.sum(tl.load(p_center + 2 * b_i + 1), 0)
        mu = total / tl.where(count > 0, count, 1.0)
    elif p_center is not None:
        mu = tl.load(p_center)
    else:
        mu = tl.full((), 0.0, tl.float64) + center
    return mu


@triton.jit
def extremes(b_min, b_max, b_x, m_x):
    """Return minima and maxima with the values at `m_x` in them."""
    # A NaN enters, and stays as it is neither above nor below.
    m_nan = b_x != b_x
    return (
        tl.where(m_x & ((b_x < b_min) | m_nan), b_x, b_min),
        tl.where(m_x & ((b_x > b_max) | m_nan), b_x, b_max),
    )


@triton.jit
def smallest(b_x, AXIS: tl.constexpr = 0):
    """Return the minimum along an axis, NaN if one is: `tl.min` may drop it."""
    return tl.min(b_x, AXIS) + tl.sum(tl.where(b_x == b_x, 0.0, b_x), AXIS)


@triton.jit
def largest(b_x, AXIS: tl.constexpr = 0):
    """Return the maximum along an axis, NaN if one is: `tl.max` may drop it."""
    return tl.max(b_x, AXIS) + tl.sum(tl.where(b_x == b_x, 0.0, b_x), AXIS)


@triton.jit
def store_partials(
    p_out,
    policy,
    kl,
    entropy,
    ratio,
    ratio_min,
    ratio_max,
    low,
    high,
    clipped_tokens,
    z,
    k3,
    dead,
    steps,
    tokens,
    trajectories,
):
    """Write the partial sums in the order of POLICY_METRICS; the last is sum 1 / count."""
    tl.store(p_out, policy)
    tl.store(p_out + 1, kl)
    tl.store(p_out + 2, entropy)
    tl.store(p_out + 3, ratio)
    tl.store(p_out + 4, ratio_min)
    tl.store(p_out + 5, ratio_max)
    tl.store(p_out + 6, low + high)
    tl.store(p_out + 7, low)
    tl.store(p_out + 8, high)
    tl.store(p_out + 9, clipped_tokens)
    tl.store(p_out + 10, -z)
    tl.store(p_out + 11, k3)
    tl.store(p_out + 12, dead)
    tl.store(p_out + 13, steps)
    tl.store(p_out + 14, tokens)
    tl.store(p_out + 15, trajectories)


@triton.jit
def _field(b_sums, k: tl.constexpr):
    b_zero = tl.zeros_like(b_sums)
    return tl.sum(tl.where(tl.arange(0, FIELDS) == k, b_sums, b_zero), 0)


@triton.jit(do_not_specialize=["num_partials"])
def finish_policy_loss_kernel(
    p_partials,
    p_normalizer,
    p_loss,
    p_metrics,
    p_scale,
    num_partials,
    normalizer: tl.float64,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    GIVEN: tl.constexpr,
    REDUCTION: tl.constexpr,
    BP: tl.constexpr,
):
    """Add up the partial sums in a fixed order: loss, metrics and 1 / normalizer."""
    b_k = tl.arange(0, FIELDS)
    b_sums = tl.zeros([FIELDS], tl.float64)
    b_min = tl.full([FIELDS], float("inf"), tl.float64)
    b_max = tl.full([FIELDS], float("-inf"), tl.float64)
    for i in range(0, num_partials, BP):
        b_row = i + tl.arange(0, BP)[:, None]
        m_row = b_row < num_partials
        p_tile = p_partials + b_row * FIELDS + b_k[None, :]
        b_tile = tl.load(p_tile, mask=m_row, other=0.0)
        b_sums += tl.sum(b_tile, 0)
        m_extreme = m_row & (b_k == _RATIO_MIN)[None, :]
        b_least = smallest(tl.where(m_extreme, b_tile, float("inf")))
        b_min = tl.where((b_least < b_min) | (b_least != b_least), b_least, b_min)
        m_extreme = m_row & (b_k == _RATIO_MAX)[None, :]
        b_most = largest(tl.where(m_extreme, b_tile, float("-inf")))
        b_max = tl.where((b_most > b_max) | (b_most != b_most), b_most, b_max)

    steps = _field(b_sums, 13)
    tokens = _field(b_sums, 14)
    total, count = denominator(
        p_normalizer, normalizer, steps, _field(b_sums, 15), tokens, GIVEN, REDUCTION
    )

    b_divisor = tl.where(b_k <= 2, total, 1.0)
    m_steps = (b_k == 3) | ((b_k >= 6) & (b_k <= 8))
    b_divisor = tl.where(m_steps, tl.where(steps > 0, steps, 1.0), b_divisor)
    m_tokens = (b_k >= 9) & (b_k <= 12)
    b_divisor = tl.where(m_tokens, tl.where(tokens > 0, tokens, 1.0), b_divisor)
    b_metrics = b_sums / b_divisor
    b_metrics = tl.where(b_k == _RATIO_MIN, b_min, b_metrics)
    b_metrics = tl.where(b_k == _RATIO_MAX, b_max, b_metrics)
    # Without a step, ratios are 1.
    m_ratios = (b_k >= 3) & (b_k <= _RATIO_MAX)
    b_metrics = tl.where(m_ratios & (tokens.to(tl.int64) == 0), 1.0, b_metrics)
    tl.store(p_metrics + b_k, b_metrics, mask=b_k < _DENOMINATOR)

    loss = _field(b_metrics, 0) + kl_coef * _field(b_metrics, 1)
    tl.store(p_loss, loss - entropy_coef * _field(b_metrics, 2))
    tl.store(p_metrics + _DENOMINATOR, count)
    tl.store(p_scale, 1.0 / total)


def needs_token_pass(*tensors: Tensor | None) -> bool:
    """Return whether anything is written or read by token once the steps are known."""
    return any(tensor is not None for tensor in tensors)


def fixed_limits(config: KernelConfig) -> tuple[float, float]:
    """Return the bounds of the config as `step_math.limits` makes them of those of steps."""
    if int(config.surrogate) in (SOFT.value, QUADRATIC.value, TV.value):
        return config.clip_low, config.clip_high
    return 1.0 - config.clip_low, 1.0 + config.clip_high


def new_gradients(
    like: Tensor, need_grad: bool, need_entropy_grad: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the outputs of the gradients, None where one is not asked for."""
    return (
        torch.empty_like(like) if need_grad else None,
        torch.empty_like(like) if need_entropy_grad else None,
    )


def new_partials(like: Tensor, num_programs: int) -> Tensor:
    """Return room for the sums of each program."""
    return like.new_empty((num_programs, FIELDS.value), dtype=torch.float64)


def find_center(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    step_ids: Tensor | None,
    index: Tensor | None,
    mask: Tensor | None,
    ratio_center: Tensor | None,
    config: KernelConfig,
    advantages_per_token: bool,
) -> tuple[Tensor | None, float, int]:
    """Return mu as (pointer, number, number of partial sums), launching a kernel if it must be."""
    if int(config.ratio) != CENTERED.value:
        return None, 0.0, 0
    # On-policy, z is 0 and so is its mean.
    if ratio_center is not None or old_log_probs is None:
        return *scalar(ratio_center, log_probs.device), 0
    num_tokens = log_probs.numel() if index is None else index.numel()
    partials = log_probs.new_empty((_CENTER_PROGRAMS, 2), dtype=torch.float64)
    log_ratio_sum_kernel[(_CENTER_PROGRAMS,)](
        log_probs,
        old_log_probs,
        advantages,
        step_ids,
        index,
        mask,
        partials,
        num_tokens,
        config.token_clip_low,
        config.token_clip_high,
        ADV_PER_TOKEN=advantages_per_token,
        TOKEN_CLIP=config.clips_tokens,
        ALIGNED=index is None and aligned(num_tokens),
        BT=FLAT_BLOCK,
        **threads(FLAT_BLOCK),
        **(all_registers() if config.clips_tokens else {}),
    )
    return partials, 0.0, _CENTER_PROGRAMS


def finish(
    like: Tensor, partials: Tensor, normalizer: Tensor | None, config: KernelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss and metrics of the partial sums, and what gradients lack."""
    loss = like.new_empty(())
    metrics = like.new_empty((NUM_POLICY_METRICS,), dtype=torch.float64)
    scale = metrics.new_empty(())
    p_normalizer, number = scalar(normalizer, like.device)
    finish_policy_loss_kernel[(1,)](
        partials,
        p_normalizer,
        loss,
        metrics,
        scale,
        partials.shape[0],
        number,
        config.kl_coef,
        config.entropy_coef,
        GIVEN=normalizer is not None,
        REDUCTION=int(config.reduction),
        BP=64,
        **threads(512),
    )
    return loss, metrics, scale
