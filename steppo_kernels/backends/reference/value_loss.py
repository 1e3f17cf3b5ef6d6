"""The clipped value loss at the states where steps begin, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .gae import at_states
from .reductions import reduction_weights


def value_loss(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None,
    values_per_token: bool,
    old_values_per_token: bool,
    state_index: Tensor,
    step_lengths: Tensor,
    trajectory_counts: Tensor,
    normalizer: Tensor | None,
    clip: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Return the loss (differentiable) and `VALUE_METRICS`.

    Arguments are those of the operator `value_loss` in `steppo_kernels.backends.operators`.
    """
    kept = step_lengths > 0
    zero = torch.zeros_like(returns)
    reached = at_states(values, state_index) if values_per_token else values
    v = torch.where(kept, reached, zero)
    target = torch.where(kept, returns, zero)
    loss = (v - target) ** 2
    is_clipped = torch.zeros_like(kept)
    if old_values is not None:
        old = at_states(old_values, state_index) if old_values_per_token else old_values
        old = torch.where(kept, old, zero)
        # Within the clip range the clipped value is the value itself, to the last bit.
        # Written so that a NaN reaches the loss.
        is_moved = ~((v - old).abs() <= clip)
        held = torch.where(is_moved, old + (v - old).detach().clamp(-clip, clip), v)
        clipped = (held - target) ** 2
        is_clipped = is_moved & ~(clipped <= loss)
        loss = torch.where(is_clipped, clipped, loss)
    loss = 0.5 * loss
    weights, count = reduction_weights(step_lengths, trajectory_counts, reduction, v.dtype)
    total = count if normalizer is None else normalizer.to(device=count.device, dtype=v.dtype)
    objective = (weights * loss).sum() / total + values[:0].sum()

    with torch.no_grad():
        num_steps = kept.sum()

        def mean(x: Tensor) -> Tensor:
            return torch.where(kept, x, zero).to(torch.float64).sum() / num_steps.clamp_min(1)

        residual = target - v
        spread = mean((target - mean(target)) ** 2)
        unexplained = mean((residual - mean(residual)) ** 2)
        explained = torch.where(spread > 0, 1 - unexplained / spread, 0.0)
        rows = (
            objective,
            mean(is_clipped.to(v.dtype)),
            mean(v),
            mean(target),
            explained,
            num_steps,
        )
        metrics = torch.stack([value.to(torch.float64) for value in rows])
    return objective, metrics
