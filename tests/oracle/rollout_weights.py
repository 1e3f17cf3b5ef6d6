"""Weights that correct for the policy that sampled, in plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from oracle.layout import OracleLayout


class RolloutWeights(NamedTuple):
    """Weights and what they were before the bounds.

    Attributes:
        weights: at flat positions at level token, 0 where no action token; else by step.
        metrics: of the units that have tokens, before the bounds.
        margin: how far the closest weight is from a bound, relative to it.
    """

    weights: list[float]
    metrics: dict[str, float]
    margin: float


def rollout_weights(
    old_log_probs: Sequence[float],
    rollout_log_probs: Sequence[float],
    layout: OracleLayout,
    *,
    level: str,
    pool: str,
    low: float | None,
    high: float | None,
    outside: str,
) -> RolloutWeights:
    """Return e to the pooled log-ratio of old and rollout policy, kept inside the bounds.

    Args:
        old_log_probs, rollout_log_probs: at flat positions.
        layout: the steps.
        level: a unit is a ``"token"``, a ``"step"`` or a ``"trajectory"``.
        pool: ``"mean"`` or ``"sum"`` over the tokens of a unit.
        low, high: the bounds; None where there is none.
        outside: ``"truncate"`` to the bounds, or ``"mask"`` with 0 outside of them.
    """
    if level == "token":
        owners, count = list(range(layout.size)), layout.size
        members = [[at] if step >= 0 else [] for at, step in enumerate(layout.step_ids)]
        absent = 0.0
    elif level == "step":
        owners, count = list(range(len(layout.steps))), len(layout.steps)
        members = layout.steps
        absent = 1.0
    else:
        trajectory_of = layout.trajectory_of
        count = len(layout.steps)
        owners = [-1 if own is None else own for own in trajectory_of]
        members = [[at for s in own for at in layout.steps[s]] for own in layout.trajectories]
        absent = 1.0
    found: dict[int, float] = {}
    for unit, tokens in enumerate(members):
        if tokens:
            z = [old_log_probs[at] - rollout_log_probs[at] for at in tokens]
            x = math.fsum(z) / (len(z) if pool == "mean" else 1)
            found[unit] = math.exp(min(max(x, -20.0), 20.0))
    kept = {unit: _inside(weight, low, high, outside) for unit, weight in found.items()}
    margin = min(
        (abs(w / bound - 1.0) for w in found.values() for bound in (low, high) if bound),
        default=math.inf,
    )
    return RolloutWeights(
        [kept.get(owners[at], absent) for at in range(count)],
        _metrics(list(found.values()), low, high),
        margin,
    )


def _inside(weight: float, low: float | None, high: float | None, outside: str) -> float:
    below, above = _sides(weight, low, high)
    if not (below or above):
        return weight
    if outside == "mask":
        return 0.0
    return low if below else high


def _sides(weight: float, low: float | None, high: float | None) -> tuple[bool, bool]:
    """Return whether a weight lies below the bounds, and whether above."""
    return low is not None and weight < low, high is not None and weight > high


def _metrics(weights: list[float], low: float | None, high: float | None) -> dict[str, float]:
    if not weights:
        return {"mean": 1.0, "min": 1.0, "max": 1.0, "ess": 1.0, "outside_fraction": 0.0}
    total, count = math.fsum(weights), len(weights)
    return {
        "mean": total / count,
        "min": min(weights),
        "max": max(weights),
        "ess": total**2 / (count * math.fsum(weight * weight for weight in weights)),
        "outside_fraction": sum(any(_sides(weight, low, high)) for weight in weights) / count,
    }
