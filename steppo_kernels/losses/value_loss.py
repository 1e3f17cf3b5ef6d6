"""The clipped value loss on steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import operators
from ..backends.choice import Backend, resolve
from ..backends.derivatives import first_only, keep_inputs, kept_inputs
from ..backends.reference import value_loss as reference
from ..config import REDUCTIONS, Reduction, one_of
from ..layout.step_layout import StepLayout, require_layout
from ..outputs import VALUE_METRICS, Metrics, StepPOOutput
from .policy_loss import scaled_gradient


def step_value_loss(
    values: Tensor,
    returns: Tensor,
    layout: StepLayout,
    *,
    old_values: Tensor | None = None,
    clip: float = 0.5,
    reduction: Reduction = "step_mean",
    normalizer: float | Tensor | None = None,
    backend: Backend = "auto",
) -> StepPOOutput:
    r"""Return the clipped squared error of the step values (PPO's value loss, on steps).

    .. math:: \tfrac12 \max\big((v-R)^2, (v_{old} + \mathrm{clip}(v - v_{old}, \pm c) - R)^2\big)

    Only the positions of ``layout.state_index`` are trained; every other one gets gradient 0.
    Empty steps do not count.

    Args:
        values: per step ``[S]``, or of the token shape with position i the value of the state
            before token i. fp16 and bf16 are computed in fp32; the gradient comes back in the
            dtype of the input.
        returns: ``[S]``. No gradient.
        layout: the steps.
        old_values: like `values`; None turns clipping off. No gradient.
        clip: c > 0.
        reduction: weights and denominator, as in `StepPOConfig`.
        normalizer: replaces the denominator; a number or a 0-dim tensor.
        backend: implementation.

    Returns:
        `StepPOOutput` with `VALUE_METRICS`; means are over non-empty steps.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument.
    """
    steps = require_layout(layout)
    device, shape, num_steps = steps.device, steps.shape, steps.num_steps
    values = checks.floating("values", values, device)
    dtype = checks.compute_dtype(values)
    one_of("reduction", reduction, REDUCTIONS)
    clip = checks.positive_number("clip", clip)
    chosen = resolve(backend, device)
    new, by_token = checks.steps_or_tokens("values", values, num_steps, shape, device, dtype)
    returns = checks.vector("returns", returns, num_steps, "step", device, dtype).detach()
    old, old_by_token = None, False
    if old_values is not None:
        old, old_by_token = checks.steps_or_tokens(
            "old_values", old_values, num_steps, shape, device, dtype
        )
        old = old.detach()
    total = checks.normalizer(normalizer, device, steps.num_tokens == 0)
    args = (
        new,
        returns,
        old,
        by_token,
        old_by_token,
        steps.state_index,
        steps.step_lengths,
        steps.trajectory_counts,
        total,
        clip,
    )
    if chosen == "reference":
        loss, metrics = reference.value_loss(*args, reduction)
    else:
        number = REDUCTIONS.index(reduction)
        if checks.wants_gradient(new):
            loss, metrics = _ValueLoss.apply(values, chosen, (*args[1:], number))
        else:
            loss, metrics, *_ = operators.call("value_loss", chosen, *args, number, False)
    return StepPOOutput(loss, Metrics(metrics, VALUE_METRICS))


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, backend: str, rest: tuple[Any, ...]
    ) -> tuple[Tensor, ...]:
        dtype = checks.compute_dtype(values)
        loss, metrics, grad, grad_scale = operators.call(
            "value_loss", backend, checks.flat(values, dtype), *rest, True
        )
        ctx.save_for_backward(grad, grad_scale)
        keep_inputs(ctx, values)
        ctx.values = values.shape, values.dtype
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @first_only("step_value_loss", kept_inputs)
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad, grad_scale = ctx.saved_tensors
        return scaled_gradient(grad, grad_loss, grad_scale, *ctx.values), None, None
