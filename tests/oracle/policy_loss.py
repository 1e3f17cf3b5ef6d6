"""The step-level policy loss in plain loops, with its gradients.

A surrogate is one function in `SURROGATES`, a ratio one in `RATIOS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from oracle.layout import OracleLayout

NAN = math.nan


class LossConfig(NamedTuple):
    """Hyper-parameters, named as those of the package."""

    ratio: str = "geometric"
    surrogate: str = "clip"
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    dual_clip: float | None = None
    log_ratio_max: float = 10.0
    reduction: str = "step_mean"
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0


class PolicyLoss(NamedTuple):
    """A loss, its metrics and its gradients of flat positions.

    Attributes:
        margin: how far the closest number is from a place where a gradient or a count jumps.
        size: sum of the absolute values of what the loss sums, infinite ones aside.
    """

    loss: float
    metrics: dict[str, float]
    step_log_ratio: list[float]
    of_log_probs: list[float]
    of_entropy: list[float]
    margin: float
    size: float


class Point(NamedTuple):
    """A surrogate at one log-ratio.

    Attributes:
        value: l(x, A).
        slope: dl/dx.
        low, high: whether it is clipped at that bound.
        margin: how far from a jump.
    """

    value: float
    slope: float
    low: bool
    high: bool
    margin: float


class Pooled(NamedTuple):
    """Log-ratio of a step, before the clamp, and the factor of its gradient of a token."""

    x: float
    share: float


# Ratios: z of the step's tokens, and the mean of z over the call.


def _geometric(z: list[float], center: float) -> Pooled:
    return Pooled(_sum(z) / len(z), 1.0 / len(z))


def _product(z: list[float], center: float) -> Pooled:
    return Pooled(_sum(z), 1.0)


def _centered(z: list[float], center: float) -> Pooled:
    share = len(z) ** -0.5
    return Pooled(center + share * _sum([one - center for one in z]), share)


RATIOS: dict[str, Callable[[list[float], float], Pooled]] = {
    "geometric": _geometric,
    "product": _product,
    "centered": _centered,
}


# Surrogates: the clamped log-ratio and the advantage.


def _clip(x: float, advantage: float, config: LossConfig) -> Point:
    ratio = _exp(x)
    low, high = 1.0 - config.clip_low, 1.0 + config.clip_high
    if math.isnan(ratio):
        return Point(NAN, NAN, False, False, math.inf)
    plain = -advantage * ratio
    bounded = -advantage * min(max(ratio, low), high)
    clipped = bounded > plain
    value, slope = (bounded, 0.0) if clipped else (plain, plain)
    margin = min(abs(ratio - low), abs(ratio - high)) if advantage else math.inf
    if config.dual_clip is not None and advantage < 0:
        limit = -config.dual_clip * advantage
        margin = min(margin, abs(ratio - config.dual_clip))
        if limit < value:
            value, slope = limit, 0.0
    return Point(value, slope, clipped and ratio < low, clipped and ratio > high, margin)


SURROGATES: dict[str, Callable[[float, float, LossConfig], Point]] = {"clip": _clip}


def _kl(d: float, estimator: str) -> tuple[float, float, float]:
    """Return KL of d = log ref - log new, its derivative of log new, and the margin."""
    if math.isnan(d):
        return NAN, NAN, math.inf
    inside = abs(d) <= 20.0
    margin = abs(abs(d) - 20.0)
    d = min(max(d, -20.0), 20.0)
    value, slope = {
        "k1": (-d, 1.0),
        "k2": (d * d / 2.0, -d),
        "k3": (math.expm1(d) - d, -math.expm1(d)),
    }[estimator]
    margin = min(margin, abs(abs(value) - 10.0))
    if abs(value) > 10.0:
        return math.copysign(10.0, value), 0.0, margin
    return value, slope if inside else 0.0, margin


def policy_loss(
    log_probs: Sequence[float],
    old_log_probs: Sequence[float] | None,
    advantages: Sequence[float],
    layout: OracleLayout,
    *,
    config: LossConfig,
    ref_log_probs: Sequence[float] | None = None,
    entropy: Sequence[float] | None = None,
    is_weights: Sequence[float] | None = None,
    step_weights: Sequence[float] | None = None,
    normalizer: float | None = None,
    ratio_center: float | None = None,
) -> PolicyLoss:
    """Return the loss; everything but `step_weights` is given at flat positions."""
    z = {}
    for at in layout.actions:
        if old_log_probs is not None:
            z[at] = _minus(log_probs[at], old_log_probs[at])
        else:
            z[at] = 0.0 if math.isfinite(log_probs[at]) else NAN
    count = len(z)
    center = _sum(list(z.values())) / count if count else 0.0
    if ratio_center is not None and old_log_probs is not None:
        center = ratio_center
    weights, denominator = layout.weights(config.reduction)
    weights = weights if step_weights is None else list(step_weights)
    denominator = denominator if normalizer is None else normalizer

    of_log_probs, of_entropy = [0.0] * layout.size, [0.0] * layout.size
    log_ratios, ratios = [0.0] * len(layout.steps), []
    policy = kl_total = entropy_total = 0.0
    low = high = token_clipped = 0.0
    dead, margin, size = 0, math.inf, 0.0
    for step, tokens in enumerate(layout.steps):
        if not tokens:
            continue
        length = len(tokens)
        pooled = RATIOS[config.ratio]([z[at] for at in tokens], center)
        log_ratios[step] = pooled.x
        beyond = pooled.x > config.log_ratio_max
        x = config.log_ratio_max if beyond else pooled.x
        margin = min(margin, _distance(pooled.x, config.log_ratio_max))
        ratios.append(_exp(x))
        scale = weights[step] / denominator
        for at in tokens:
            advantage = advantages[at]
            weight = 1.0 if is_weights is None else is_weights[at]
            point = SURROGATES[config.surrogate](x, advantage, config)
            margin = min(margin, point.margin)
            slope = 0.0 if beyond or advantage == 0 else point.slope
            low += point.low / length
            high += point.high / length
            token_clipped += point.low or point.high
            term = scale * weight * point.value / length
            policy += term
            size += _finite(term)
            gradient = scale * weight * slope * pooled.share
            live = gradient != 0
            of_log_probs[at] = gradient
            if ref_log_probs is not None:
                value, slope, near = _kl(
                    _minus(ref_log_probs[at], log_probs[at]), config.kl_estimator
                )
                kl_total += scale * value / length
                size += _finite(scale * value / length)
                if config.kl_coef:
                    margin = min(margin, near)
                    part = config.kl_coef * scale * slope / length
                    of_log_probs[at] += part
                    live = live or part != 0
            if entropy is not None:
                entropy_total += scale * entropy[at] / length
                size += _finite(scale * entropy[at] / length)
                of_entropy[at] = -config.entropy_coef * scale / length
                live = live or of_entropy[at] != 0
            dead += not live
    loss = policy
    if config.kl_coef:
        loss += config.kl_coef * kl_total
    if config.entropy_coef:
        loss -= config.entropy_coef * entropy_total
    steps = len(ratios)
    metrics = {
        "policy_loss": policy,
        "kl_loss": kl_total,
        "entropy": entropy_total,
        "clip_fraction": (low + high) / steps if steps else 0.0,
        "clip_fraction_low": low / steps if steps else 0.0,
        "clip_fraction_high": high / steps if steps else 0.0,
        "token_clip_fraction": token_clipped / count if count else 0.0,
        "approx_kl": -_sum(list(z.values())) / count if count else 0.0,
        "approx_kl_k3": _sum([_kl(one, "k3")[0] for one in z.values()]) / count if count else 0.0,
        "dead_token_fraction": dead / count if count else 0.0,
        "num_steps": float(steps),
        "num_tokens": float(count),
    }
    if steps:
        unknown = any(math.isnan(ratio) for ratio in ratios)
        metrics["ratio_mean"] = _sum(ratios) / steps
        metrics["ratio_min"] = NAN if unknown else min(ratios)
        metrics["ratio_max"] = NAN if unknown else max(ratios)
    return PolicyLoss(loss, metrics, log_ratios, of_log_probs, of_entropy, margin, size)


# Arithmetic that raises nothing where numbers are not finite.


def _finite(x: float) -> float:
    return abs(x) if math.isfinite(x) else 0.0


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 or math.isnan(x) else math.inf


def _minus(a: float, b: float) -> float:
    return NAN if math.isinf(a) and a == b else a - b


def _distance(a: float, b: float) -> float:
    return math.inf if math.isnan(a) else abs(a - b)


def _sum(numbers: list[float]) -> float:
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else sum(numbers)
