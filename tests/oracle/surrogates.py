"""The surrogates of the policy loss: value, slope and clipping of one unit, a step or a token.

Each is one function in `SURROGATES`. Its slope is -A c, with c the weight of the unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

NAN = math.nan


class Unit(NamedTuple):
    """What a surrogate is a function of.

    Attributes:
        x: log-ratio, clamped above.
        capped: whether it reaches log_ratio_max.
        advantage: A.
        low, high: the two bounds, clip_low and clip_high.
        gap: probability of the token minus that of the old policy.
        dual_clip: bound of the loss of negative advantages.
        soft_temperatures: for A >= 0 and for A < 0.
    """

    x: float
    capped: bool
    advantage: float
    low: float
    high: float
    gap: float
    dual_clip: float | None
    soft_temperatures: tuple[float, float]

    @property
    def ratio(self) -> float:
        return exp(self.x)


class Point(NamedTuple):
    """A surrogate at one unit.

    Attributes:
        value: l(x, A).
        slope: what the gradient multiplies dx with; dl/dx but for constant weights.
        clipped: whether it counts as clipped.
        margin: how far from a jump of the slope or of the count.
        value_size, slope_size: size of the terms that a rounding error of x enlarges.
    """

    value: float
    slope: float
    clipped: bool
    margin: float
    value_size: float
    slope_size: float


def surrogate(name: str, unit: Unit) -> Point:
    """Return a surrogate at a unit; an unknown ratio has no value and is not clipped."""
    if math.isnan(unit.ratio):
        return Point(NAN, 0.0 if unit.advantage == 0 else NAN, False, math.inf, 0.0, 0.0)
    point = SURROGATES[name](unit)
    if point.clipped:
        # It counts as clipped low or high by the side of 1.
        point = point._replace(margin=min(point.margin, abs(unit.ratio - 1.0)))
    if unit.advantage == 0:
        point = point._replace(slope=0.0)
    return point


def _clip(unit: Unit) -> Point:
    ratio, advantage = unit.ratio, unit.advantage
    low, high = 1.0 - unit.low, 1.0 + unit.high
    plain = -advantage * ratio
    bounded = -advantage * min(max(ratio, low), high)
    clipped = bounded > plain
    value, slope = (bounded, 0.0) if clipped else (plain, plain)
    margin = min(abs(ratio - low), abs(ratio - high)) if advantage else math.inf
    if unit.dual_clip is not None and advantage < 0:
        limit = -unit.dual_clip * advantage
        margin = min(margin, abs(ratio - unit.dual_clip))
        if limit < value:
            value, slope = limit, 0.0
    return Point(value, slope, clipped, margin, abs(value), abs(slope))


def _cispo(unit: Unit) -> Point:
    low, high = 1.0 - unit.low, 1.0 + unit.high
    weight = min(max(unit.ratio, low), high)
    clipped = unit.ratio <= low or unit.ratio >= high
    return _weighted(unit, weight, clipped, min(abs(unit.ratio - low), abs(unit.ratio - high)))


def _mask(unit: Unit) -> Point:
    low, high = 1.0 - unit.low, 1.0 + unit.high
    weight = unit.ratio if low <= unit.ratio <= high else 0.0
    clipped = unit.ratio <= low or unit.ratio >= high
    return _weighted(unit, weight, clipped, min(abs(unit.ratio - low), abs(unit.ratio - high)))


def _tv(unit: Unit) -> Point:
    negative = unit.advantage < 0
    inside = unit.gap >= -unit.low if negative else unit.gap <= unit.high
    margin = abs(unit.gap + unit.low if negative else unit.gap - unit.high)
    weight = unit.ratio if inside else 0.0
    margin = min(margin, _vanishing(unit.x))
    return _weighted(unit, weight, weight == 0 or unit.capped, margin)


def _soft(unit: Unit) -> Point:
    ratio, advantage = unit.ratio, unit.advantage
    tau = unit.soft_temperatures[1 if advantage < 0 else 0]
    distance = tau * (ratio - 1.0)
    # sech^2(y/2) = 4 sigma(y) sigma(-y)
    weight = ratio * 4.0 * _sigmoid(distance) * _sigmoid(-distance)
    value = -advantage * 4.0 / tau * _sigmoid(distance)
    return Point(
        value,
        -advantage * weight,
        weight == 0,
        _vanishing(unit.x + math.log(4.0) - abs(distance)),
        abs(advantage) * (4.0 / tau + weight),
        abs(advantage) * weight * (1.0 + tau * ratio),
    )


def _quadratic(unit: Unit) -> Point:
    ratio, advantage = unit.ratio, unit.advantage
    negative = advantage < 0
    bound = unit.low if negative else unit.high
    share = 1.0 + (ratio - 1.0) / bound if negative else 1.0 - (ratio - 1.0) / bound
    weight = ratio * share
    square = (ratio - 1.0) ** 2 / (2.0 * bound)
    margin = math.inf if ratio == 0 else min(abs(share), _vanishing(unit.x))
    return Point(
        -advantage * ratio + abs(advantage) * square,
        -advantage * weight,
        weight == 0,
        margin,
        abs(advantage) * (ratio + ratio * abs(ratio - 1.0) / bound + square),
        abs(advantage) * ratio * (1.0 + (2.0 * ratio + 1.0) / bound),
    )


SURROGATES: dict[str, Callable[[Unit], Point]] = {
    "clip": _clip,
    "cispo": _cispo,
    "mask": _mask,
    "soft": _soft,
    "quadratic": _quadratic,
    "tv": _tv,
}

# Their weight is a constant: it goes on where the log-ratio is clamped.
CONSTANT = ("cispo", "tv")


def _weighted(unit: Unit, weight: float, clipped: bool, margin: float) -> Point:
    """Return the point of value and slope -A c."""
    value = -unit.advantage * weight
    return Point(value, value, clipped, margin, abs(value), abs(value))


def _vanishing(log_weight: float) -> float:
    """Return the margin of a weight that some dtypes can hold and others round to 0."""
    return 0.0 if -760.0 < log_weight < -85.0 else math.inf


def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1.0 / (1.0 + exp(-x))
    return exp(x) / (1.0 + exp(x))


def exp(x: float) -> float:
    """Return e^x, infinite where no float holds it."""
    return math.exp(x) if x < 700 or math.isnan(x) else math.inf
