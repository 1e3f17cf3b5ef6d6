"""The clipped value loss in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from ...outputs import VALUE_METRICS
from .launch import dtype_code, empty, kernels, pointer, threads


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
    reduction: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the operator `value_loss` of `steppo_kernels.backends.operators`."""
    loss, grad_scale = values.new_empty(()), values.new_empty(())
    metrics = empty(len(VALUE_METRICS), torch.float64)
    grad = values.new_empty(values.numel() if need_grad else 0)
    kernels.value_loss(
        dtype_code(values),
        pointer(values),
        pointer(returns),
        pointer(old_values),
        values_per_token,
        old_values_per_token,
        pointer(state_index),
        pointer(step_lengths),
        pointer(trajectory_counts),
        pointer(normalizer),
        clip,
        reduction,
        values.numel(),
        state_index.numel(),
        pointer(loss),
        pointer(metrics),
        pointer(grad) if need_grad else 0,
        pointer(grad_scale),
        threads(),
    )
    return loss, metrics, grad, grad_scale
