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
        The value, whose derivative by `x` is the slope; the slope, a constant, exactly 0 where A
        is; and a bool tensor.
    """
    x, advantages = torch.broadcast_tensors(x, advantages)
    ratio = capped_ratio(x.detach(), config.log_ratio_max)
    unit = _Unit(x.detach(), ratio, advantages, low, high, config, gap)
    value, weight, is_clipped = _SURROGATES[config.surrogate](unit)
    is_still = advantages == 0
    if config.surrogate not in _WITH_CONSTANT_WEIGHT:
        is_still = is_still | (x > config.log_ratio_max)
    weight = torch.where(is_still, 0.0, weight)
    slope = torch.where(is_still, 0.0, -advantages * weight)
    return moved_by(x, value, -advantages, weight), slope, is_clipped


def capped_ratio(x: Tensor, log_ratio_max: float) -> Tensor:
    """Return e^x with x clamped above; a NaN stays one."""
    return torch.where(x > log_ratio_max, log_ratio_max, x).exp()


def moved_by(x: Tensor, value: Tensor, factor: Tensor, other: Tensor | None = None) -> Tensor:
    """Return `value` with the derivative by `x` that is the product of the factors, of its shape.

    A derivative of 0 makes the gradient 0, whatever the gradient of the value is, and an infinite
    number has one like any other.
    """
    moved: Tensor = _MovedBy.apply(x, value, factor, other)
    return moved


class _MovedBy(torch.autograd.Function):
    # Without *args: torch.compile takes their number for that of a forward without ctx.
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, factor: Tensor, other: Tensor | None) -> Tensor:
        ctx.save_for_backward(factor, other)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor, other = ctx.saved_tensors
        moved = torch.where(factor == 0, 0.0, grad * factor)
        if other is not None:
            moved = torch.where(other == 0, 0.0, moved * other)
        return moved, None, None, None


def _clip(unit: _Unit) -> _Found:
    """PPO: max(-A rho, -A clip(rho)), where A < 0 at most -A dual_clip. A tie is not clipped."""
    ratio, advantages = unit.ratio, unit.advantages
    unclipped = -advantages * ratio
    clipped = -advantages * _between(ratio, *_borders(unit))
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
    return -unit.advantages * weight, weight, _reaches_border(unit)


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
    # sech^2(y / 2) is 4 sigmoid(y) sigmoid(-y). 1 - sigmoid(y) would cancel.
    weight = unit.ratio * 4 * away.sigmoid() * (-away).sigmoid()
    return -unit.advantages * (4 / temperature) * away.sigmoid(), weight, weight == 0


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
    return -unit.advantages * weight, weight, is_clipped


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
