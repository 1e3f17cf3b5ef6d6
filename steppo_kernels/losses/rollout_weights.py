"""Weights that correct for another policy, or another engine, having sampled."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .. import checks, csr
from ..backends import operators
from ..backends.choice import Backend, resolve
from ..backends.untraced import traced
from ..config import one_of
from ..layout.broadcast import sum_over_steps
from ..layout.step_layout import StepLayout
from ..layout.step_tensors import StepTensors
from ..outputs import ROLLOUT_METRICS, Metrics, RolloutWeights
from .step_log_ratios import steps_of

Level = Literal["token", "step", "trajectory"]
Pool = Literal["mean", "sum"]
Outside = Literal["truncate", "mask"]

# e to more than this tells no more; the bound of verl's rollout correction.
_LOG_WEIGHT_MAX = 20.0


@traced
def rollout_weights(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    layout: StepLayout | Tensor,
    *,
    level: Level = "token",
    pool: Pool = "mean",
    low: float | None = None,
    high: float | None = None,
    outside: Outside = "truncate",
    backend: Backend = "auto",
) -> RolloutWeights:
    """Return importance weights from the policy that sampled to the one that a loss calls old.

    A weight is e^x with x the log-ratio, old minus rollout, of a unit: of a token, or pooled over a
    step or a trajectory and clamped to +-20. The weights are the `is_weights` of a loss. Masked
    positions may hold anything. Nothing here carries a gradient.

    Args:
        old_log_probs: log-probs of the taken tokens under the policy that the ratios of the loss
            start from, of the token shape (with dimensions of size 1 more or less, or flat).
        rollout_log_probs: those that the engine reported when it sampled them. An engine may have
            none for some tokens: take these out with ``layout.keep``.
        layout: the steps; or a mask, bool or 0/1, ``[B, T]`` or ``[N]`` (one row), whose runs of
            ones are the steps and whose rows are the trajectories.
        level: what has a weight of its own: each ``"token"``, ``"step"`` or ``"trajectory"``.
        pool: x is the ``"mean"`` (a geometric mean of ratios) or the ``"sum"`` over the tokens of
            the unit. Of a single token they are the same.
        low: lower bound of the weights, of at least 0. None is no bound.
        high: upper bound, likewise.
        outside: a weight outside of the bounds is ``"truncate"``: moved to the closer bound, or
            ``"mask"``: 0.
        backend: implementation.

    Returns:
        `RolloutWeights`. `weights` are fp32 (fp64 if `old_log_probs` is): of the token shape at
        level ``"token"``, 1 at masked positions; else ``[S]``, at level ``"trajectory"`` that of
        the step's trajectory, and 1 where a unit has no token. `metrics` are over the units that
        have tokens, before the bounds: mean, min and max; ess, the effective sample size (sum w)^2
        / (n sum w^2) as a share of n; outside_fraction. Without any token they are 1, 1, 1, 1, 0.

    Raises:
        ValueError: a rollout log-prob at an action token is not finite, on a CPU and outside of
            compiled graphs; elsewhere the weight of its unit is NaN, as looking would wait for the
            device. Or another argument, which is named, is wrong.
        TypeError, RuntimeError: naming the argument.

    Example:
        >>> import torch
        >>> from steppo_kernels import StepLayout, rollout_weights
        >>> layout = StepLayout.from_mask(torch.tensor([[1, 1, 0, 1]]))
        >>> old = torch.tensor([[0.25, 0.5, 0.0, 0.8]]).log()
        >>> sampled = torch.tensor([[0.5, 0.5, 0.0, 0.2]]).log()
        >>> found = rollout_weights(old, sampled, layout, high=2.0)
        >>> found.weights
        tensor([[0.5000, 1.0000, 1.0000, 2.0000]])
        >>> round(found.metrics.as_dict()["max"], 4)
        4.0
        >>> rollout_weights(old, sampled, layout, level="step", pool="sum").weights
        tensor([0.5000, 4.0000])
    """
    one_of("level", level, ("token", "step", "trajectory"))
    one_of("pool", pool, ("mean", "sum"))
    one_of("outside", outside, ("truncate", "mask"))
    bounds = _bounds(low, high)
    steps: StepTensors | None = None
    if isinstance(layout, Tensor) and level == "token":
        # Tokens need no steps.
        mask = checks.flags("layout", layout, (1, 2), wait=False)
        shape, device, is_action = mask.shape, mask.device, mask.reshape(-1)
    else:
        steps = steps_of(layout, backend)
        shape, device, is_action = steps.shape, steps.device, steps.step_ids.view(-1) >= 0
    chosen = resolve(backend, device)
    dtype = checks.compute_dtype(checks.floating("old_log_probs", old_log_probs, device))
    with torch.no_grad():
        old = checks.tokens("old_log_probs", old_log_probs, shape, device, dtype).view(-1)
        rollout = checks.tokens("rollout_log_probs", rollout_log_probs, shape, device, dtype)
        rollout = rollout.view(-1)
        _check_known(rollout, is_action)
        z = old - torch.where(rollout.isfinite(), rollout, torch.nan)
        if steps is None or level == "token":
            x, lengths = z, is_action.to(torch.int64)
        else:
            x, lengths = _pooled(z, steps, level, chosen)
            if pool == "mean":
                x = x / lengths.clamp_min(1)
        has_tokens = lengths > 0
        raw = x.clamp(-_LOG_WEIGHT_MAX, _LOG_WEIGHT_MAX).exp()
        metrics = _metrics(raw, has_tokens, bounds)
        weights = torch.where(has_tokens, _within(raw, bounds, outside), 1.0)
        if steps is not None and level == "trajectory":
            # The weight behind the last one is that of a step of no trajectory.
            of_steps = csr.owners(steps.trajectory_steps, steps.trajectory_offsets, steps.num_steps)
            weights = torch.cat((weights, weights.new_ones(1)))[of_steps]
    return RolloutWeights(
        weights.view(shape) if level == "token" else weights, Metrics(metrics, ROLLOUT_METRICS)
    )


def _bounds(low: float | None, high: float | None) -> tuple[float, float]:
    """Return the bounds, 0 and infinity where there are none."""
    lowest = 0.0 if low is None else checks.positive_number("low", low, or_zero=True)
    highest = math.inf if high is None else checks.positive_number("high", high, or_zero=True)
    if lowest > highest:
        raise ValueError(f"low: got {low!r}, expected at most high, which is {high!r}")
    return lowest, highest


def _check_known(rollout: Tensor, is_action: Tensor) -> None:
    """Raise for an action token without a log-prob, where looking costs no wait."""
    if rollout.device.type != "cpu" or torch.compiler.is_compiling():
        return
    unknown = is_action & ~rollout.isfinite()
    if bool(unknown.any()):
        raise ValueError(
            f"rollout_log_probs: got {rollout[unknown][0].item()} at an action token, expected "
            "finite numbers: take such tokens out with layout.keep"
        )


def _pooled(z: Tensor, steps: StepTensors, level: str, backend: str) -> tuple[Tensor, Tensor]:
    """Return the sum and the number of tokens of each step or trajectory."""
    sums, lengths = sum_over_steps(z, steps, backend), steps.step_lengths
    if level == "step":
        return sums, lengths
    # Steps are to trajectories as tokens are to steps.
    members, offsets = steps.trajectory_steps, steps.trajectory_offsets
    total = operators.call("sum_over_steps", backend, sums, members, offsets)
    counted = csr.prefix(lengths[members].to(torch.int64))[offsets]
    return total, counted.diff()


def _within(weights: Tensor, bounds: tuple[float, float], outside: str) -> Tensor:
    if outside == "truncate":
        return weights.clamp(*bounds)
    return torch.where(_is_outside(weights, bounds), 0.0, weights)


def _is_outside(weights: Tensor, bounds: tuple[float, float]) -> Tensor:
    low, high = bounds
    return (weights < low) | (weights > high)


def _metrics(weights: Tensor, has_tokens: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Return `ROLLOUT_METRICS` of the units that have tokens and the hidden entries, as fp64."""
    is_outside = _is_outside(weights, bounds) & has_tokens
    weights = weights.to(torch.float64)
    kept = torch.where(has_tokens, weights, 0.0)
    total, squares = kept.sum(), kept.square().sum()
    num_weights = has_tokens.sum().to(torch.float64)
    is_empty = num_weights == 0
    count = num_weights.clamp_min(1.0)
    # An entry of 1 stands in where there is no unit. A NaN is both the least and the largest.
    lowest, largest = (
        torch.cat(
            (
                torch.where(has_tokens, weights, unseen),
                torch.where(is_empty, 1.0, unseen).to(weights).reshape(1),
            )
        )
        for unseen in (math.inf, -math.inf)
    )
    values = (
        torch.where(is_empty, 1.0, total / count),
        lowest.amin(),
        largest.amax(),
        torch.where(is_empty, 1.0, total.square() / (count * squares)),
        is_outside.sum() / count,
        num_weights,
        total,
        squares,
    )
    return torch.stack(values)
