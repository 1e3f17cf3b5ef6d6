"""The step objective as device functions: log-ratios, surrogates, KL, denominator.

    x = mu + L^-p sum(z - mu), or the token's own z;  rho = e^min(x, log_ratio_max)
    dl / dx = -A c, with the weight c of the surrogate

A unit is a step, or a token where the token has its own ratio. Where tokens of one ratio have their
own advantages, both signs of A make a unit each. Selections are `tl.where`, as minimum and maximum
may drop a NaN.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from ...config import KL_ESTIMATORS, RATIOS, REDUCTIONS, SURROGATES

GEOMETRIC = tl.constexpr(RATIOS.index("geometric"))
PRODUCT = tl.constexpr(RATIOS.index("product"))
CENTERED = tl.constexpr(RATIOS.index("centered"))
TOKEN = tl.constexpr(RATIOS.index("token"))
CLIP = tl.constexpr(SURROGATES.index("clip"))
CISPO = tl.constexpr(SURROGATES.index("cispo"))
MASK = tl.constexpr(SURROGATES.index("mask"))
SOFT = tl.constexpr(SURROGATES.index("soft"))
QUADRATIC = tl.constexpr(SURROGATES.index("quadratic"))
TV = tl.constexpr(SURROGATES.index("tv"))
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
def divide(b_x, b_y):
    """Return the quotient, rounded to nearest: a GPU's own in fp32 may err by two last places."""
    return tl.div_rn(b_x, b_y) if b_x.dtype == tl.float32 else b_x / b_y


@triton.jit
def pool(b_sum, b_len, b_inverse, mu, RATIO: tl.constexpr):
    """Return the log-ratios of steps, and L^-p, from sum z; all in fp64.

    `b_inverse` is 1 / `b_len`, or 1 for no token.
    """
    if RATIO == PRODUCT:
        b_scale = tl.full(b_sum.shape, 1.0, tl.float64)
        b_log_ratio = b_sum
    elif RATIO == CENTERED:
        b_scale = tl.sqrt(b_inverse)
        b_log_ratio = mu + b_scale * (b_sum - b_len.to(tl.float64) * mu)
        b_log_ratio = tl.where(b_len > 0, b_log_ratio, 0.0)
    else:
        b_scale = b_inverse
        b_log_ratio = b_sum * b_scale
    return b_log_ratio, b_scale


@triton.jit
def clip_tokens(b_z, b_adv, low, high):
    """Return the log-ratios of tokens as pooling sees them, and where `token_clip` bites."""
    m_high = (b_adv >= 0) & (b_z > high)
    m_low = (b_adv < 0) & (b_z < -low)
    return tl.where(m_high, high, tl.where(m_low, -low, b_z)), m_high | m_low


@triton.jit
def limits(b_low, b_high, SURROGATE: tl.constexpr):
    """Return bounds as `surrogate` takes them: of the ratio, but where it wants their size."""
    if SURROGATE != SOFT and SURROGATE != QUADRATIC and SURROGATE != TV:
        b_low = 1.0 - b_low
        b_high = 1.0 + b_high
    return b_low, b_high


@triton.jit
def surrogate(
    b_x,
    b_gap,
    b_adv,
    low,
    high,
    dual_clip,
    soft_positive,
    soft_negative,
    log_ratio_max,
    SURROGATE: tl.constexpr,
):
    """Return of each unit: rho, the value l(x, A), dl / dx, whether it is clipped, and below 1.

    Everything is computed in the dtype of `b_x`; what comes in fp64 is rounded to it. `b_gap` is
    p - q of a token, which only TV reads. `low` and `high` are what `limits` returns.
    """
    dtype: tl.constexpr = b_x.dtype
    cap = tl.full((), log_ratio_max, dtype)
    m_beyond = b_x > cap
    b_ratio, b_excess = exp_and_excess(tl.where(m_beyond, cap, b_x))
    low = low.to(dtype)
    high = high.to(dtype)
    m_negative = b_adv < 0
    if SURROGATE == CLIP:
        b_value = -b_adv * b_ratio
        b_other = -b_adv * clamp(b_ratio, low, high)
        m_clipped = b_other > b_value
        b_bound = -b_adv * tl.full((), dual_clip, dtype)
        b_worst = tl.where(m_clipped, b_other, b_value)
        m_bounded = (b_bound > 0) & (b_worst > b_bound)
        m_live = ~m_beyond & (b_adv != 0) & ~m_clipped & ~m_bounded
        b_slope = tl.where(m_live, b_value, 0.0)
        b_value = tl.where(m_bounded, b_bound, b_worst)
        # The sign of A tells on which side of 1 the ratio was clipped, and is at hand.
        m_below = m_negative
    else:
        m_below = b_ratio < 1
        if SURROGATE == CISPO:
            b_c = clamp(b_ratio, low, high)
            m_clipped = (b_ratio <= low) | (b_ratio >= high)
        elif SURROGATE == MASK:
            b_c = tl.where((b_ratio < low) | (b_ratio > high), 0.0, b_ratio)
            m_clipped = (b_ratio <= low) | (b_ratio >= high)
        elif SURROGATE == TV:
            m_inside = tl.where(m_negative, b_gap >= -low, b_gap <= high)
            # Without a ratio the token has no weight either, not even 0.
            b_c = tl.where(m_inside | (b_ratio != b_ratio), b_ratio, 0.0)
            m_clipped = (b_c == 0) | (b_x >= cap)
        elif SURROGATE == SOFT:
            negative = tl.full((), soft_negative, dtype)
            b_tau = tl.where(m_negative, negative, tl.full((), soft_positive, dtype))
            b_y = b_tau * b_excess
            # e^-|y|: sigma(y) is 1 or that over 1 + that, sech^2(y / 2) is 4 sigma(y) sigma(-y).
            b_small, _ = exp_and_excess(-tl.abs(b_y))
            b_whole = 1.0 + b_small
            b_c = b_ratio * divide(4.0 * b_small, b_whole * b_whole)
            m_clipped = b_c == 0
        else:
            b_step = divide(b_excess, tl.where(m_negative, low, high))
            b_c = b_ratio * (1.0 + tl.where(m_negative, b_step, -b_step))
            m_clipped = b_c == 0
        m_live = (b_adv != 0) & (b_c != 0)
        if SURROGATE != CISPO and SURROGATE != TV:
            m_live = m_live & ~m_beyond
        b_slope = tl.where(m_live, -b_adv * b_c, 0.0)
        if SURROGATE == SOFT:
            b_sigma = divide(tl.where(b_y >= 0, 1.0, b_small), b_whole)
            b_value = -b_adv * divide(4.0 * b_sigma, b_tau)
        elif SURROGATE == QUADRATIC:
            b_value = times(tl.abs(b_adv), 0.5 * b_excess * b_step) - b_adv * b_ratio
        else:
            b_value = -b_adv * b_c
    return b_ratio, b_value, b_slope, m_clipped, m_below


@triton.jit
def signed_surrogates(
    b_x,
    low,
    high,
    dual_clip,
    soft_positive,
    soft_negative,
    log_ratio_max,
    SURROGATE: tl.constexpr,
):
    """Return rho; then value, slope and whether it is clipped of A = 1; then those of A = -1.

    Value and slope are multiples of |A|: `of_advantage` makes them those of a token. Pooled ratios
    come in fp64, and so both signs are decided in fp64 whatever the dtype of the tokens is.
    """
    b_one = tl.full(b_x.shape, 1.0, b_x.dtype)
    b_ratio, b_value, b_slope, m_clipped, _ = surrogate(
        b_x,
        b_x,
        b_one,
        low,
        high,
        dual_clip,
        soft_positive,
        soft_negative,
        log_ratio_max,
        SURROGATE,
    )
    _, b_value_negative, b_slope_negative, m_clipped_negative, _ = surrogate(
        b_x,
        b_x,
        -b_one,
        low,
        high,
        dual_clip,
        soft_positive,
        soft_negative,
        log_ratio_max,
        SURROGATE,
    )
    return (
        b_ratio,
        b_value,
        b_slope,
        m_clipped,
        b_value_negative,
        b_slope_negative,
        m_clipped_negative,
    )


@triton.jit
def of_advantage(b_adv, b_value, b_slope, m_clipped, SURROGATE: tl.constexpr):
    """Return value, slope and whether it is clipped, from those of the sign of A."""
    b_size = tl.abs(b_adv.to(tl.float64))
    m_clipped = m_clipped & (b_adv == b_adv)
    if SURROGATE == CLIP:
        # Without an advantage nothing tells the branches of a clip apart.
        m_clipped = m_clipped & (b_adv != 0)
    b_slope = tl.where(b_adv != 0, times(b_slope, b_size), 0.0)
    return b_size * b_value, b_slope, m_clipped


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
    """Return e^d of -110 <= d <= 100 to the last bits.

    The fp32 exponential of a GPU loses up to |d| units in the last place, as it multiplies by
    log2(e) first.
    """
    if b_d.dtype == tl.float64:
        b_exp = tl.exp(b_d)
    else:
        b_power, b_part = _power_and_part(b_d)
        b_exp = b_power * (1.0 + b_part)
    return b_exp


@triton.jit
def exp_and_excess(b_d):
    """Return e^d and e^d - 1 of any d, the second in fp32 without cancellation."""
    if b_d.dtype == tl.float64:
        b_exp = tl.exp(b_d)
        b_excess = b_exp - 1.0
    else:
        # Beyond lies what fp32 holds as 0 or infinity.
        b_power, b_part = _power_and_part(clamp(b_d, -110.0, 100.0))
        b_exp = b_power * (1.0 + b_part)
        b_excess = b_power * b_part + (b_power - 1.0)
    return b_exp, b_excess


@triton.jit
def probability_gap(b_new, b_old):
    """Return e^new - e^old."""
    b_p, _ = exp_and_excess(b_new)
    b_q, _ = exp_and_excess(b_old)
    return b_p - b_q


@triton.jit
def _power_and_part(b_d):
    """Return 2^k and r with e^d = 2^k (1 + r), in fp32."""
    b_k = tl.floor(b_d * 1.4426950408889634 + 0.5)
    # ln 2 in two parts, the first so short that its product with k is exact.
    b_r = (b_d - b_k * 0.693359375) + b_k * 2.12194440054690582767e-4
    b_tail = b_r * (1.0 / 40320.0) + 1.0 / 5040.0
    b_tail = b_tail * b_r + 1.0 / 720.0
    b_tail = b_tail * b_r + 1.0 / 120.0
    b_tail = b_tail * b_r + 1.0 / 24.0
    b_tail = b_tail * b_r + 1.0 / 6.0
    b_tail = b_tail * b_r + 0.5
    return tl.exp2(b_k), b_r + b_tail * b_r * b_r


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
    """Return what a sum over steps is divided by, and what that is before it is kept from 0; fp64.

    That is the number at `p_normalizer`, or `normalizer` if one was GIVEN, or else what the
    reduction counts, at least 1. `trajectories` may be a sum of 1 / count over steps.
    """
    if p_normalizer is not None:
        count = tl.load(p_normalizer)
        total = count
    elif GIVEN:
        count = tl.full((), 0.0, tl.float64) + normalizer
        total = count
    else:
        count = tl.full((), 1.0, tl.float64)
        if REDUCTION == STEP_MEAN:
            count = steps
        elif REDUCTION == TRAJECTORY_MEAN:
            # Every trajectory adds 1, up to rounding.
            count = tl.floor(trajectories + 0.5)
        elif REDUCTION == TOKEN_MEAN:
            count = tokens
        total = tl.where(count > 1.0, count, 1.0)
    return total, count
