"""The step objective as device functions: log-ratio, clipped loss, slope, KL, denominator.

    log rho = mu + L^-p sum(z - mu)
    l = max(-A rho, -A clip(rho, 1 - eps_low, 1 + eps_high)), bounded by -c A where A < 0

Selections are `tl.where`, as minimum and maximum may drop a NaN.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from ...config import KL_ESTIMATORS, RATIOS, REDUCTIONS

GEOMETRIC = tl.constexpr(RATIOS.index("geometric"))
PRODUCT = tl.constexpr(RATIOS.index("product"))
CENTERED = tl.constexpr(RATIOS.index("centered"))
STEP_MEAN = tl.constexpr(REDUCTIONS.index("step_mean"))
TRAJECTORY_MEAN = tl.constexpr(REDUCTIONS.index("trajectory_mean"))
TOKEN_MEAN = tl.constexpr(REDUCTIONS.index("token_mean"))
K1 = tl.constexpr(KL_ESTIMATORS.index("k1"))
K2 = tl.constexpr(KL_ESTIMATORS.index("k2"))


@triton.jit
def clamp(b_x, low, high):
    """Return x within [low, high]; NaN stays."""
    return tl.where(b_x < low, low, tl.where(b_x > high, high, b_x))


@triton.jit
def times(coefficient, factor):
    """Return the product; a coefficient of 0 makes it 0, whatever the other factor is."""
    return tl.where(coefficient != 0, coefficient * factor, 0.0)


@triton.jit
def step_terms(
    b_sum,
    b_len,
    b_inverse,
    b_adv,
    mu,
    low,
    high,
    dual_clip,
    log_ratio_max,
    RATIO: tl.constexpr,
):
    """Return what a step of `b_len` tokens with `b_sum` = sum z gives, all in fp64.

    `b_inverse` is 1 / `b_len`, or 1 for no token. Returned are log-ratio, ratio, loss, d loss /
    d log pi of each token, and whether the clipped branch is strictly larger.
    """
    if RATIO == GEOMETRIC:
        b_scale = b_inverse
        b_log_ratio = b_sum * b_scale
    elif RATIO == PRODUCT:
        b_scale = tl.full(b_sum.shape, 1.0, tl.float64)
        b_log_ratio = b_sum
    else:
        b_scale = tl.sqrt(b_inverse)
        b_log_ratio = mu + b_scale * (b_sum - b_len.to(tl.float64) * mu)
        b_log_ratio = tl.where(b_len > 0, b_log_ratio, 0.0)
    b_ratio = tl.exp(tl.where(b_log_ratio > log_ratio_max, log_ratio_max, b_log_ratio))

    b_loss = -b_adv * b_ratio
    b_clipped = -b_adv * clamp(b_ratio, low, high)
    m_clipped = b_clipped > b_loss
    b_bound = -b_adv * dual_clip
    b_worst = tl.where(m_clipped, b_clipped, b_loss)
    m_bounded = (b_bound > 0) & (b_worst > b_bound)
    m_active = ~(b_log_ratio > log_ratio_max) & (b_adv != 0) & ~m_clipped & ~m_bounded
    b_slope = tl.where(m_active, b_loss * b_scale, 0.0)
    return b_log_ratio, b_ratio, tl.where(m_bounded, b_bound, b_worst), b_slope, m_clipped


@triton.jit
def expm1_minus(b_d):
    """Return e^d - 1 - d of |d| <= 20, accurate however small d is."""
    if b_d.dtype == tl.float64:
        b_tail = b_d * (1.0 / 1307674368000.0) + 1.0 / 87178291200.0
        b_tail = b_tail * b_d + 1.0 / 6227020800.0
        b_tail = b_tail * b_d + 1.0 / 479001600.0
    else:
        b_tail = b_d * (1.0 / 6227020800.0) + 1.0 / 479001600.0
    b_tail = b_tail * b_d + 1.0 / 39916800.0
    b_tail = b_tail * b_d + 1.0 / 3628800.0
    b_tail = b_tail * b_d + 1.0 / 362880.0
    b_tail = b_tail * b_d + 1.0 / 40320.0
    b_tail = b_tail * b_d + 1.0 / 5040.0
    b_tail = b_tail * b_d + 1.0 / 720.0
    b_tail = b_tail * b_d + 1.0 / 120.0
    b_tail = b_tail * b_d + 1.0 / 24.0
    b_tail = b_tail * b_d + 1.0 / 6.0
    b_series = (b_tail * b_d + 0.5) * b_d * b_d
    b_far = exp(b_d) - 1.0 - b_d
    near = 0.5 if b_d.dtype == tl.float64 else 1.0
    return tl.where(tl.abs(b_d) <= near, b_series, b_far)


@triton.jit
def exp(b_d):
    """Return e^d of |d| <= 20 to the last bits.

    The fp32 exponential of a GPU loses up to |d| units in the last place, as it multiplies by
    log2(e) first.
    """
    if b_d.dtype == tl.float64:
        b_exp = tl.exp(b_d)
    else:
        b_k = tl.floor(b_d * 1.4426950408889634 + 0.5)
        # ln 2 in two parts, the first so short that its product with k is exact.
        b_r = (b_d - b_k * 0.693359375) + b_k * 2.12194440054690582767e-4
        b_tail = b_r * (1.0 / 40320.0) + 1.0 / 5040.0
        b_tail = b_tail * b_r + 1.0 / 720.0
        b_tail = b_tail * b_r + 1.0 / 120.0
        b_tail = b_tail * b_r + 1.0 / 24.0
        b_tail = b_tail * b_r + 1.0 / 6.0
        b_tail = b_tail * b_r + 0.5
        b_exp = tl.exp2(b_k) * (1.0 + (b_r + b_tail * b_r * b_r))
    return b_exp


@triton.jit
def kl_k3(b_d):
    """Return the k3 estimate, d clamped to +-20 and the value to 10."""
    b_value = expm1_minus(clamp(b_d, -20.0, 20.0))
    return tl.where(b_value > 10.0, 10.0, b_value)


@triton.jit
def kl_terms(b_d, KL: tl.constexpr):
    """Return the KL estimate of d = log pi_ref - log pi and its slope in log pi."""
    b_within = clamp(b_d, -20.0, 20.0)
    if KL == K1:
        b_value = -b_within
        b_slope = tl.full(b_d.shape, 1.0, b_d.dtype)
    elif KL == K2:
        b_value = 0.5 * b_within * b_within
        b_slope = -b_within
    else:
        b_value = expm1_minus(b_within)
        b_slope = -(b_value + b_within)
    # A NaN is not beyond the bounds.
    m_beyond = (tl.abs(b_d) > 20.0) | (tl.abs(b_value) > 10.0)
    return clamp(b_value, -10.0, 10.0), tl.where(m_beyond, 0.0, b_slope)


@triton.jit
def denominator(
    p_normalizer,
    normalizer,
    steps,
    trajectories,
    tokens,
    GIVEN: tl.constexpr,
    REDUCTION: tl.constexpr,
):
    """Return what a sum over steps is divided by, in fp64.

    That is the number at `p_normalizer`, or `normalizer` if one was GIVEN, or else what the
    reduction counts, at least 1. `trajectories` may be a sum of 1 / count over steps.
    """
    if p_normalizer is not None:
        total = tl.load(p_normalizer)
    elif GIVEN:
        total = tl.full((), 0.0, tl.float64) + normalizer
    else:
        total = tl.full((), 1.0, tl.float64)
        if REDUCTION == STEP_MEAN:
            total = steps
        elif REDUCTION == TRAJECTORY_MEAN:
            # Every trajectory adds 1, up to rounding.
            total = tl.floor(trajectories + 0.5)
        elif REDUCTION == TOKEN_MEAN:
            total = tokens
        total = tl.where(total > 1.0, total, 1.0)
    return total
