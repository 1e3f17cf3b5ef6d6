"""The mathematics of a row of logits, as device functions: scales, softcap, and what stays exact.

Logits x are capped (optionally) and then divided by a temperature to be z. Exponents are taken of
differences of x, as 2^(d log2(e) / temperature).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .step_math import expm1_minus

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# e^x is 0 from here on, and the product of the two as well.
FAR = tl.constexpr(-1e5)


@triton.jit
def row_scales(p_temperatures, i_row, inverse, softcap, dtype):
    """Return 1 / temperature of a row in fp64, and what makes exponents of 2 of differences.

    Then the softcap, and 1 / softcap in two parts.
    """
    zero = tl.full((), 0.0, tl.float64)
    inverse = zero + inverse
    if p_temperatures is not None:
        inverse = 1.0 / tl.load(p_temperatures + i_row)
    inverse = tl.minimum(inverse, 1.1e308)
    scale = inverse * LOG2_E
    if dtype == tl.float32:
        # 0 times infinity, or a word at -inf times 0, would be NaN.
        scale = tl.minimum(tl.maximum(scale, 1e-37), 3.4e38)
    cap = zero + softcap
    high = (1.0 / cap).to(dtype)
    return inverse, scale.to(dtype), cap.to(dtype), high, (1.0 / cap - high).to(dtype)


@triton.jit
def log1p(x):
    """Return log(1 + x) of an fp64 number from 0, accurate however small it is."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def soft_cap(b_logit, cap, high, low):
    """Return cap tanh(x / cap) and its derivative, from e = e^(-2 |x| / cap) and r = 1 / (1 + e).

    ``high + low`` is 1 / cap: rounded to one number, it would move all logits the same way.
    """
    if b_logit.dtype == tl.float64:
        b_u = b_logit / cap
        # 1 - e would cancel near 0.
        b_m = expm1(-2.0 * tl.abs(b_u))
        b_e = 1.0 + b_m
        b_r = 1.0 / (2.0 + b_m)
        b_tanh = -b_m * b_r
    else:
        # The products of an infinite logit would be infinities of different signs.
        b_x = tl.maximum(b_logit.to(tl.float32), -3.4e38, propagate_nan=tl.PropagateNan.ALL)
        b_x = tl.minimum(b_x, 3.4e38, propagate_nan=tl.PropagateNan.ALL)
        b_u = b_x * high + b_x * low
        b_e = tl.exp2(tl.abs(b_u) * (-2.0 * LOG2_E))
        # A division costs twice as much: 1 + e is neither large nor small.
        b_root = tl.rsqrt(1.0 + b_e)
        b_r = b_root * b_root
        b_r += b_r * (1.0 - b_r * (1.0 + b_e))
        # Half precision does not see that this cancels near 0.
        b_tanh = 1.0 - 2.0 * (b_e * b_r)
        if b_logit.dtype == tl.float32:
            b_u2 = b_u * b_u
            # A fit of (tanh(u) / u - 1) / u^2, good to 5e-9 of tanh.
            b_tail = b_u2 * -5.70499e-3 + 2.063909e-2
            b_tail = b_tail * b_u2 - 5.373971e-2
            b_tail = b_tail * b_u2 + 0.13331442
            b_tail = b_tail * b_u2 - 0.33333282
            b_near = tl.abs(b_u) + tl.abs(b_u) * (b_tail * b_u2)
            b_tanh = tl.where(tl.abs(b_u) < 0.625, b_near, b_tanh)
    return cap * tl.where(b_u < 0, -b_tanh, b_tanh), 4.0 * (b_e * b_r) * b_r


@triton.jit
def scaled(x, factor, dtype):
    """Return x times an fp64 factor in `dtype`.

    Where the factor alone leaves its range, that is the end of the range, which 0 times is 0.
    """
    product = (x.to(tl.float64) * factor).to(dtype)
    if dtype == tl.float32:
        is_beyond = (tl.abs(product) == float("inf")) & (tl.abs(x) < float("inf"))
        product = tl.where(is_beyond, tl.where(product < 0, -3.4e38, 3.4e38), product)
    return product


@triton.jit
def expm1(b_x):
    """Return e^x - 1, accurate however small x is."""
    return tl.where(b_x > -0.5, b_x + expm1_minus(b_x), tl.exp(b_x) - 1.0)
