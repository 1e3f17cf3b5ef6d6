"""The clipped value loss in compiled code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...outputs import NUM_VALUE_METRICS
from ..records import States, record
from .launch import DTYPES, Native, addresses, new_metrics, new_scale, number, scalar_like


def value_loss(
    native: Native,
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None,
    step_weights: Tensor | None,
    normalizer: Tensor | None,
    states: Sequence[Tensor],
    config: tuple[float, ...],
    values_per_token: bool,
    returns_per_token: bool,
    old_values_per_token: bool,
    need_grad: bool,
) -> tuple[Tensor | None, ...]:
    """Run the operator `value_loss` of `steppo_kernels.backends.operators`."""
    loss = scalar_like(values)
    metrics = new_metrics(values, NUM_VALUE_METRICS)
    gradient_scale = new_scale(native, metrics)
    grad_values = torch.empty_like(values) if need_grad else None
    num_values = values.numel()
    tensors = (
        DTYPES[values.dtype],
        *addresses(values, returns, old_values, step_weights),
        number(normalizer, values),
        values_per_token,
        returns_per_token,
        old_values_per_token,
        num_values,
        *addresses(loss, metrics, gradient_scale, grad_values),
    )
    native.kernels.value_loss(tensors, record(States, states).fields, config, native.place(values))
    return loss, metrics, grad_values, gradient_scale
