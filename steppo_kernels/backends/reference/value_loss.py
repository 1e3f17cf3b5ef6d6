"""The clipped value loss at the states where steps begin, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..records import States
from .gae import at_states
from .reductions import denominator, reduction_weights


def value_loss(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None,
    step_weights: Tensor | None,
    normalizer: Tensor | None,
    states: States,
    clip: float,
    reduction: str,
    values_per_token: bool,
    returns_per_token: bool,
    old_values_per_token: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss (differentiable) and the metric vector.

    Arguments are those of the operator `value_loss` in `steppo_kernels.backends.operators`, but for
    its config.
    """
    state_index, lengths, trajectory_counts = states
    weights, count = reduction_weights(lengths, trajectory_counts, reduction, returns.dtype)
    total = count if normalizer is None else normalizer.to(count)
    kept = lengths > 0
    zero = returns.new_zeros(lengths.shape)
    if step_weights is not None:
        weights = torch.where(kept, step_weights, zero)
    reached = at_states(values, state_index) if values_per_token else values
    v = torch.where(kept, reached, zero)
    aim = at_states(returns, state_index) if returns_per_token else returns
    target = torch.where(kept, aim, zero)
    error = v.detach() - target
    clipped = torch.zeros_like(error)
    is_clipped = is_lost = torch.zeros_like(kept)
    if old_values is not None:
        old = at_states(old_values, state_index) if old_values_per_token else old_values
        old = torch.where(kept, old, zero)
        moved = v.detach() - old
        # Within the clip range the clipped value is the value itself, to the last bit.
        is_moved = ~(moved.abs() <= clip)
        clipped = (old + moved.clamp(-clip, clip) - target) ** 2
        is_clipped = is_moved & (clipped > error**2)
        # No number is larger than a NaN: it becomes both the loss and the gradient.
        is_lost = is_moved & clipped.isnan()
    gain = torch.ones_like(error).masked_fill(is_lost, torch.nan)
    is_flat = is_clipped | ((weights * error == 0) & ~is_lost)
    loss = torch.where(is_clipped, clipped, gain * (_ZeroStays.apply(v, is_flat) - target) ** 2)
    loss = 0.5 * loss
    # Without steps the graph must still reach the values.
    objective = (weights * loss).sum() / total + values.reshape(-1)[:0].sum()

    with torch.no_grad():
        num_steps = kept.sum()

        def added(x: Tensor) -> Tensor:
            return torch.where(kept, x, zero).to(torch.float64).sum()

        def mean(x: Tensor) -> Tensor:
            return added(x) / num_steps.clamp_min(1)

        residual = target - v
        spread = added((target - mean(target)) ** 2)
        unexplained = added((residual - mean(residual)) ** 2)
        rows = (
            objective,
            mean(is_clipped.to(v.dtype)),
            mean(v),
            mean(target),
            torch.where(spread == 0, 0.0, 1 - unexplained / spread),
            num_steps,
            denominator(lengths, count, reduction, normalizer),
            spread,
            unexplained,
        )
        metrics = torch.stack([value.to(torch.float64) for value in rows])
    return objective, metrics


class _ZeroStays(torch.autograd.Function):
    """The identity. Where its gradient is 0 times some factor, a factor of NaN makes it 0 too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, is_zero: Tensor) -> Tensor:
        ctx.save_for_backward(is_zero)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (is_zero,) = ctx.saved_tensors
        return torch.where(is_zero & grad.isnan(), 0.0, grad), None
