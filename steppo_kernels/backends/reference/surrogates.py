"""The surrogates: what a unit, a step or a token, adds to the policy loss.

A surrogate has the value l(x, A) and the slope dl/dx = -A c. The weight c tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...config import StepPOConfig

Bound = float | Tensor


class _Unit(NamedTuple):
    """What surrogates are functions of: rho = e^min(x, log_ratio_max) and the arguments below."""

    x: Tensor
    ratio: Tensor
    advantages: Tensor
    low: Bound
    high: Bound
    config: StepPOConfig
    gap: Tensor | None


# Value, weight c, and whether the unit counts as clipped.
_Found = tuple[Tensor, Tensor, Tensor]


def surrogate(
    x: Tensor,
    advantages: Tensor,
    low: Bound,
    high: Bound,
    config: StepPOConfig,
    gap: Tensor | None = None,
) -> _Found:
    """Return the value of the config's surrogate, its slope, and where it counts as clipped.

    A NaN is not clipped. Comparisons with it are False, so that it becomes value and slope.

    Args:
        x: log-ratios, before the clamp at log_ratio_max.
        advantages: A; its shape and that of `x` broadcast.
        low: a number, or of a shape that broadcasts to that of the others.
        high: like `low`; the bounds of the surrogate.
        config: names the surrogate. Its own bounds are not read.
        gap: new minus old probability, for ``"tv"``.

    Returns:
        The value, whose derivative by `x` is the slope wherever that is not 0; the slope, a
        constant, exactly 0 where A is 0; and a bool tensor.
    """
    x, advantages = torch.broadcast_tensors(x, advantages)
    ratio = capped_ratio(x, config.log_ratio_max)
    unit = _Unit(x, ratio, advantages, low, high, config, gap)
    value, weight, is_clipped = _SURROGATES[config.surrogate](unit)
    moves = advantages != 0
    if config.surrogate not in _WITH_CONSTANT_WEIGHT:
        moves = moves & ~(x > config.log_ratio_max)
    slope = torch.where(moves, -advantages * weight.detach(), 0.0)
    return value, slope, is_clipped


def capped_ratio(x: Tensor, log_ratio_max: float) -> Tensor:
    """Return e^x with x clamped above, without gradient beyond; a NaN stays one, gradient too."""
    return torch.where(x > log_ratio_max, log_ratio_max, x).exp()


def moving_zero(x: Tensor) -> Tensor:
    """Return 0 with the derivative 1 by x, also where x is infinite and x - x is none."""
    zero: Tensor = _MovingZero.apply(x)
    return zero


class _MovingZero(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _clip(unit: _Unit) -> _Found:
    """PPO: max(-A rho, -A clip(rho)), where A < 0 at most -A dual_clip. A tie is not clipped."""
    ratio, advantages = unit.ratio, unit.advantages
    unclipped = -advantages * ratio
    clipped = -advantages * _between(ratio.detach(), *_borders(unit))
    is_clipped = clipped > unclipped
    value = torch.where(is_clipped, clipped, unclipped)
    weight = torch.where(is_clipped, 0.0, ratio)
    if unit.config.dual_clip is not None:
        bound = -unit.config.dual_clip * advantages
        is_bounded = (advantages < 0) & (value > bound)
        value = torch.where(is_bounded, bound, value)
        weight = torch.where(is_bounded, 0.0, weight)
    return value, weight, is_clipped


def _cispo(unit: _Unit) -> _Found:
    """CISPO: the weight is the clipped ratio, a constant."""
    weight = _between(unit.ratio, *_borders(unit))
    return _with_constant_weight(unit, weight), weight, _reaches_border(unit)


def _mask(unit: _Unit) -> _Found:
    """IcePop: the ratio within its bounds, nothing outside of them."""
    lower, upper = _borders(unit)
    is_outside = (unit.ratio < lower) | (unit.ratio > upper)
    weight = torch.where(is_outside, 0.0, unit.ratio)
    return -unit.advantages * weight, weight, _reaches_border(unit)


def _soft(unit: _Unit) -> _Found:
    """SAPO: a gate that closes smoothly on both sides of 1."""
    temperature = _by_sign(unit, *unit.config.soft_temperature)
    away = temperature * (unit.ratio - 1)
    # sech^2(y / 2) is 4 sigmoid(y) sigmoid(-y). 1 - sigmoid(y) would cancel, here and in autograd.
    opening, closing = away.sigmoid(), (-away).sigmoid()
    gate = torch.where(away > 0, 1 - closing, opening)
    weight = unit.ratio * 4 * opening * closing
    return -unit.advantages * (4 / temperature) * gate, weight, weight == 0


def _quadratic(unit: _Unit) -> _Found:
    """SPO: a parabola whose slope is 0 at the bound on the advantage's side."""
    ratio, advantages = unit.ratio, unit.advantages
    share = (ratio - 1) / _by_sign(unit, unit.high, unit.low)
    value = -advantages * ratio + advantages.abs() * (ratio - 1) * share / 2
    weight = ratio * torch.where(advantages < 0, 1 + share, 1 - share)
    return value, weight, weight == 0


def _tv(unit: _Unit) -> _Found:
    """DPPO-TV: the ratio where the probability has not moved past its bound, a constant."""
    assert unit.gap is not None
    is_past = torch.where(unit.advantages < 0, unit.gap < -unit.low, unit.gap > unit.high)
    weight = torch.where(is_past, 0.0, unit.ratio)
    is_clipped = (weight == 0) | (unit.x >= unit.config.log_ratio_max)
    return _with_constant_weight(unit, weight), weight, is_clipped


_SURROGATES: dict[str, Callable[[_Unit], _Found]] = {
    "clip": _clip,
    "cispo": _cispo,
    "mask": _mask,
    "soft": _soft,
    "quadratic": _quadratic,
    "tv": _tv,
}
# They keep their slope where x is clamped.
_WITH_CONSTANT_WEIGHT = ("cispo", "tv")


def _with_constant_weight(unit: _Unit, weight: Tensor) -> Tensor:
    """Return -A c with the derivative -A c."""
    return -unit.advantages * weight.detach() * (1 + moving_zero(unit.x))


def _by_sign(unit: _Unit, positive: Bound, negative: Bound) -> Tensor:
    """Return `negative` where A < 0, else `positive`, in the dtype of the ratio."""
    zero = torch.zeros_like(unit.ratio)
    return torch.where(unit.advantages < 0, zero + negative, zero + positive)


def _borders(unit: _Unit) -> tuple[Bound, Bound]:
    return 1 - unit.low, 1 + unit.high


def _reaches_border(unit: _Unit) -> Tensor:
    lower, upper = _borders(unit)
    return (unit.ratio <= lower) | (unit.ratio >= upper)


def _between(ratio: Tensor, lower: Bound, upper: Bound) -> Tensor:
    """Return the ratio clamped to numbers or tensors; a NaN stays one."""
    return torch.where(ratio < lower, lower, torch.where(ratio > upper, upper, ratio))
