"""The step-level policy loss in plain loops, with its gradients.

A ratio is one function in `RATIOS`, a surrogate one in `oracle.surrogates`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from oracle.layout import OracleLayout
from oracle.surrogates import CONSTANT, Unit, exp, surrogate

NAN = math.nan


class LossConfig(NamedTuple):
    """Hyper-parameters, named as those of the package."""

    ratio: str = "geometric"
    surrogate: str = "clip"
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    dual_clip: float | None = None
    token_clip: tuple[float, float] | None = None
    soft_temperature: tuple[float, float] = (1.0, 1.05)
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
        slope_size: the largest of the terms that a policy gradient sums, infinite ones aside.
    """

    loss: float
    metrics: dict[str, float]
    step_log_ratio: list[float]
    of_log_probs: list[float]
    of_entropy: list[float]
    margin: float
    size: float
    slope_size: float


class Pooled(NamedTuple):
    """Log-ratios of a step.

    Attributes:
        of_step: that of the step, before the clamp.
        of_tokens: that which each token's surrogate is taken of.
        share: factor of the gradient of a token.
    """

    of_step: float
    of_tokens: list[float]
    share: float


# Ratios: z of the step's tokens, and the mean of z over the call.


def _geometric(z: list[float], center: float) -> Pooled:
    return _alike(_sum(z) / len(z), z, 1.0 / len(z))


def _product(z: list[float], center: float) -> Pooled:
    return _alike(_sum(z), z, 1.0)


def _centered(z: list[float], center: float) -> Pooled:
    share = len(z) ** -0.5
    return _alike(center + share * _sum([one - center for one in z]), z, share)


def _token(z: list[float], center: float) -> Pooled:
    return Pooled(_sum(z) / len(z), z, 1.0 / len(z))


def _alike(x: float, z: list[float], share: float) -> Pooled:
    return Pooled(x, [x] * len(z), share)


RATIOS: dict[str, Callable[[list[float], float], Pooled]] = {
    "geometric": _geometric,
    "product": _product,
    "centered": _centered,
    "token": _token,
}


def step_log_ratios(
    log_probs: Sequence[float],
    old_log_probs: Sequence[float] | None,
    layout: OracleLayout,
    *,
    ratio: str,
    upstream: Sequence[float],
    ratio_center: float | None = None,
) -> tuple[list[float], list[float]]:
    """Return the log-ratio of each step, and the gradient of each position's log-prob."""
    z = log_ratios(log_probs, old_log_probs, layout)
    center = _center(z, old_log_probs, ratio_center)
    values, gradient = [0.0] * len(layout.steps), [0.0] * layout.size
    for step, tokens in enumerate(layout.steps):
        if tokens:
            pooled = RATIOS[ratio]([z[at] for at in tokens], center)
            values[step] = pooled.of_step
            for at in tokens:
                gradient[at] = upstream[step] * pooled.share
    return values, gradient


def log_ratios(
    log_probs: Sequence[float], old_log_probs: Sequence[float] | None, layout: OracleLayout
) -> dict[int, float]:
    """Return z of each action token."""
    z = {}
    for at in layout.actions:
        if old_log_probs is not None:
            z[at] = _minus(log_probs[at], old_log_probs[at])
        else:
            z[at] = 0.0 if math.isfinite(log_probs[at]) else NAN
    return z


def _center(
    z: dict[int, float], old_log_probs: Sequence[float] | None, ratio_center: float | None
) -> float:
    """Return the mean of z; on-policy it is 0, whatever is given."""
    if ratio_center is not None and old_log_probs is not None:
        return ratio_center
    return _sum(list(z.values())) / len(z) if z else 0.0


def _clamped(z: float, advantage: float, bounds: tuple[float, float] | None) -> float:
    """Return a token's log-ratio after `token_clip`."""
    if bounds is None or math.isnan(z):
        return z
    low, high = bounds
    if advantage >= 0:
        return min(z, high)
    return max(z, -low) if advantage < 0 else z


def _clearance(z: float, advantage: float, bounds: tuple[float, float] | None) -> float:
    """Return how far a token is from where `token_clip` begins to bite."""
    if bounds is None:
        return math.inf
    return _distance(z, -bounds[0] if advantage < 0 else bounds[1])


def kl_penalty(d: float, estimator: str) -> tuple[float, float, float]:
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
    clip_low: Sequence[float] | None = None,
    clip_high: Sequence[float] | None = None,
) -> PolicyLoss:
    """Return the loss.

    `step_weights`, `clip_low` and `clip_high` are given by step, all others at flat positions.
    """
    raw = log_ratios(log_probs, old_log_probs, layout)
    count = len(raw)
    bounds = config.token_clip
    z = {at: _clamped(one, advantages[at], bounds) for at, one in raw.items()}
    center = _center(z, old_log_probs, ratio_center)
    weights, denominator = layout.weights(config.reduction)
    weights = weights if step_weights is None else list(step_weights)
    denominator = denominator if normalizer is None else normalizer

    of_log_probs, of_entropy = [0.0] * layout.size, [0.0] * layout.size
    log_ratio_of_steps, ratios, means = [0.0] * len(layout.steps), [], []
    policy = kl_total = entropy_total = 0.0
    low = high = 0.0
    dead, clipped, margin, size, slope_size = 0, 0, math.inf, 0.0, 0.0
    for step, tokens in enumerate(layout.steps):
        if not tokens:
            continue
        length = len(tokens)
        pooled = RATIOS[config.ratio]([z[at] for at in tokens], center)
        log_ratio_of_steps[step] = pooled.of_step
        scale = weights[step] / denominator
        own = []
        for at, unclamped in zip(tokens, pooled.of_tokens, strict=True):
            beyond = unclamped > config.log_ratio_max
            unit = Unit(
                x=config.log_ratio_max if beyond else unclamped,
                capped=unclamped >= config.log_ratio_max,
                advantage=advantages[at],
                low=config.clip_low if clip_low is None else clip_low[step],
                high=config.clip_high if clip_high is None else clip_high[step],
                gap=0.0 if old_log_probs is None else exp(log_probs[at]) - exp(old_log_probs[at]),
                dual_clip=config.dual_clip,
                soft_temperatures=config.soft_temperature,
            )
            own.append(unit.ratio)
            point = surrogate(config.surrogate, unit)
            if old_log_probs is not None:
                # On-policy nothing is rounded, and ties are ties in every dtype.
                margin = min(
                    margin,
                    point.margin,
                    _distance(unclamped, config.log_ratio_max),
                    _clearance(raw[at], advantages[at], bounds),
                )
            bitten = not math.isnan(raw[at]) and z[at] != raw[at]
            beyond = beyond and config.surrogate not in CONSTANT
            slope = 0.0 if bitten or beyond else point.slope
            low += (point.clipped and unit.ratio < 1.0) / length
            high += (point.clipped and unit.ratio >= 1.0) / length
            clipped += point.clipped
            weight = 1.0 if is_weights is None else is_weights[at]
            policy += scale * weight * point.value / length
            size += _finite(scale * weight * point.value_size / length)
            # What is 0 stays so, whatever is behind it: the slope first, the token's weight last.
            gradient = 0.0 if slope == 0 else scale * slope * pooled.share
            gradient = 0.0 if gradient == 0 else gradient * weight
            live = gradient != 0
            of_log_probs[at] = gradient
            if live:
                terms = scale * weight * point.slope_size * pooled.share
                slope_size = max(slope_size, _finite(terms))
            if ref_log_probs is not None:
                value, slope, near = kl_penalty(
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
        means.append(_sum(own) / length)
        ratios += own
    loss = policy
    if config.kl_coef:
        loss += config.kl_coef * kl_total
    if config.entropy_coef:
        loss -= config.entropy_coef * entropy_total
    steps = len(means)
    far = _sum([kl_penalty(one, "k3")[0] for one in raw.values()])
    metrics = {
        "policy_loss": policy,
        "kl_loss": kl_total,
        "entropy": entropy_total,
        "clip_fraction": (low + high) / steps if steps else 0.0,
        "clip_fraction_low": low / steps if steps else 0.0,
        "clip_fraction_high": high / steps if steps else 0.0,
        "token_clip_fraction": clipped / count if count else 0.0,
        "approx_kl": -_sum(list(raw.values())) / count if count else 0.0,
        "approx_kl_k3": far / count if count else 0.0,
        "dead_token_fraction": dead / count if count else 0.0,
        "num_steps": float(steps),
        "num_tokens": float(count),
    }
    if steps:
        unknown = any(math.isnan(ratio) for ratio in ratios)
        metrics["ratio_mean"] = _sum(means) / steps
        metrics["ratio_min"] = NAN if unknown else min(ratios)
        metrics["ratio_max"] = NAN if unknown else max(ratios)
    return PolicyLoss(
        loss, metrics, log_ratio_of_steps, of_log_probs, of_entropy, margin, size, slope_size
    )


# Arithmetic that raises nothing where numbers are not finite.


def _finite(x: float) -> float:
    return abs(x) if math.isfinite(x) else 0.0


def _minus(a: float, b: float) -> float:
    return NAN if math.isinf(a) and a == b else a - b


def _distance(a: float, b: float) -> float:
    return math.inf if math.isnan(a) else abs(a - b)


def _sum(numbers: list[float]) -> float:
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else sum(numbers)
