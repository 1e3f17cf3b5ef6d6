"""What a reduction multiplies and divides the loss of a step by (the table of reductions)."""

from __future__ import annotations

import torch
from torch import Tensor


def reduction_weights(
    lengths: Tensor, trajectory_counts: Tensor, reduction: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return w_s ``[S]`` (0 for an empty step) and the normalizer of a reduction, at least 1."""
    nonempty = (lengths > 0).to(dtype)
    if reduction == "step_mean":
        weights, total = nonempty, nonempty.sum()
    elif reduction == "trajectory_mean":
        weights = nonempty / trajectory_counts.clamp_min(1).to(dtype)
        # Every trajectory adds 1, up to rounding.
        total = weights.to(torch.float64).sum().round().to(dtype)
    elif reduction == "token_mean":
        weights, total = lengths.to(dtype), lengths.sum().to(dtype)
    else:
        weights, total = nonempty, nonempty.new_ones(())
    return weights, total.clamp_min(1.0)


def denominator(
    lengths: Tensor, total: Tensor, reduction: str, normalizer: Tensor | None
) -> Tensor:
    """Return what the sums of a loss were divided by, fp64, for metrics that are merged later.

    `total` is the second result of `reduction_weights`, which is 1 where there is nothing to count.
    Here that is 0, so that a part without steps adds nothing.
    """
    if normalizer is not None:
        return normalizer.to(total.device, torch.float64)
    counted = total.to(torch.float64)
    return counted if reduction == "sum" else torch.where(lengths.sum() > 0, counted, 0.0)
