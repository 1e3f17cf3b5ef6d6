"""The clipped loss of step values in plain loops, with its gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from oracle.layout import OracleLayout


class ValueLoss(NamedTuple):
    """A loss, its metrics and its gradient of each step's value.

    Attributes:
        gradient: of the value of each step (position `layout.states[s]`).
        margin: how far the closest number is from a place where the gradient jumps.
        size: of the terms that the loss sums, before their differences cancel.
    """

    loss: float
    metrics: dict[str, float]
    gradient: list[float]
    margin: float
    size: float


def value_loss(
    values: Mapping[int, float],
    returns: Sequence[float],
    layout: OracleLayout,
    *,
    old_values: Mapping[int, float] | None,
    clip: float,
    reduction: str,
    normalizer: float | None = None,
    step_weights: Sequence[float] | None = None,
) -> ValueLoss:
    """Return the loss of the values of the steps that hold tokens."""
    weights, denominator = layout.weights(reduction)
    if step_weights is not None:
        weights = list(step_weights)
    if normalizer is not None:
        denominator = normalizer
    full = [step for step, tokens in enumerate(layout.steps) if tokens]
    gradient = [0.0] * len(layout.steps)
    total, size, margin, clipped = 0.0, 0.0, math.inf, 0
    for step in full:
        error = values[step] - returns[step]
        loss, slope = 0.5 * error * error, error
        if old_values is not None:
            move = values[step] - old_values[step]
            margin = min(margin, abs(abs(move) - clip))
            if abs(move) > clip:
                bound = old_values[step] + math.copysign(clip, move) - returns[step]
                margin = min(margin, abs(abs(bound) - abs(error)))
                if bound * bound > error * error:
                    loss, slope = 0.5 * bound * bound, 0.0
                    clipped += 1
        total += weights[step] * loss / denominator
        size += (
            abs(weights[step]) * (1.0 + abs(values[step]) + abs(returns[step])) ** 2 / denominator
        )
        gradient[step] = weights[step] * slope / denominator
    count = len(full)
    metrics = {"value_loss": total, "num_steps": float(count)}
    metrics["clip_fraction"] = clipped / count if count else 0.0
    metrics["value_mean"] = math.fsum(values[s] for s in full) / count if count else 0.0
    metrics["return_mean"] = math.fsum(returns[s] for s in full) / count if count else 0.0
    spread = _variance([returns[s] for s in full])
    if spread > 0:
        unexplained = _variance([returns[s] - values[s] for s in full])
        metrics["explained_variance"] = 1.0 - unexplained / spread
    return ValueLoss(total, metrics, gradient, margin, size)


def _variance(numbers: list[float]) -> float:
    if not numbers:
        return 0.0
    mean = math.fsum(numbers) / len(numbers)
    return math.fsum((number - mean) ** 2 for number in numbers) / len(numbers)
