"""The clipped value loss on steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import operators
from ..backends.choice import Backend, resolve
from ..backends.derivatives import (
    around_autograd,
    first_only,
    keep_inputs,
    kept_inputs,
    wants_gradient,
    with_others,
)
from ..backends.reference import value_loss as reference
from ..backends.saved import hand_over, handed_back
from ..backends.untraced import traced
from ..config import REDUCTIONS, Reduction, one_of
from ..layout.step_layout import StepLayout, require_layout
from ..outputs import VALUE_METRICS, Metrics, StepPOOutput
from .scaled_gradient import scaled_gradient


@traced
def step_value_loss(
    values: Tensor,
    returns: Tensor,
    layout: StepLayout,
    *,
    old_values: Tensor | None = None,
    clip: float = 0.5,
    reduction: Reduction = "step_mean",
    step_weights: Tensor | None = None,
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
        returns: per step ``[S]``, or of the token shape: then that of a step is read where its
            value is, at ``layout.state_index``. No gradient.
        layout: the steps.
        old_values: like `values`; None turns clipping off. No gradient.
        clip: c > 0.
        reduction: weights and denominator, as in `StepPOConfig`.
        step_weights: ``[S]``, replaces the weights; the denominator stays that of the reduction.
            No gradient.
        normalizer: replaces the denominator; a number or a 0-dim tensor.
        backend: implementation.

    Returns:
        `StepPOOutput` with `VALUE_METRICS`; means are over non-empty steps.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument.

    Example:
        >>> import torch
        >>> from steppo_kernels import StepLayout, step_value_loss
        >>> layout = StepLayout.from_mask(torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]))
        >>> values = torch.tensor([0.5, 0.5, 0.25], requires_grad=True)
        >>> step_value_loss(values, torch.ones(3), layout).loss.backward()
        >>> values.grad
        tensor([-0.1667, -0.1667, -0.2500])
    """
    steps = require_layout(layout)
    device, shape, num_steps = steps.device, steps.shape, steps.num_steps
    values = checks.floating("values", values, device)
    dtype = checks.compute_dtype(values)
    one_of("reduction", reduction, REDUCTIONS)
    clip = checks.positive_number("clip", clip)
    chosen = resolve(backend, device)
    new, by_token = checks.steps_or_tokens("values", values, num_steps, shape, device, dtype)
    returns, returns_by_token = checks.steps_or_tokens(
        "returns", returns, num_steps, shape, device, dtype
    )
    returns = checks.constant(returns)
    old_by_token = False
    if old_values is not None:
        old_values, old_by_token = checks.steps_or_tokens(
            "old_values", old_values, num_steps, shape, device, dtype
        )
        old_values = checks.constant(old_values)
    if step_weights is not None:
        step_weights = checks.constant(
            checks.vector("step_weights", step_weights, num_steps, "step", device, dtype)
        )
    if normalizer is not None:
        normalizer = checks.normalizer(normalizer, device, steps.num_tokens == 0)
    if chosen == "reference":
        loss, metrics = reference.value_loss(
            new,
            returns,
            old_values,
            step_weights,
            normalizer,
            steps.states,
            clip,
            reduction,
            by_token,
            returns_by_token,
            old_by_token,
        )
    else:
        constants = (
            returns,
            old_values,
            step_weights,
            normalizer,
            steps.states,
            (clip, float(REDUCTIONS.index(reduction))),
            by_token,
            returns_by_token,
            old_by_token,
        )
        if wants_gradient(new):
            loss, metrics = around_autograd(_ValueLoss, values, chosen, constants)
        else:
            loss, metrics, *_ = operators.call("value_loss", chosen, new, *constants, False)
    adds_up = normalizer is not None or reduction == "sum"
    return StepPOOutput(loss, Metrics(metrics, VALUE_METRICS, adds_up))


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        backend: str,
        constants: tuple[Any, ...],
        others: list[Any] | None,
    ) -> Any:
        dtype = checks.compute_dtype(values)
        loss, metrics, grad, scale = operators.call(
            "value_loss", backend, checks.solid(values, dtype), *constants, True
        )
        hand_over(ctx, grad, scale)
        keep_inputs(ctx, values)
        ctx.backend, ctx.values = backend, (values.shape, values.dtype)
        return with_others(ctx, loss, others, metrics)

    @staticmethod
    @first_only("step_value_loss", kept_inputs)
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad, scale = handed_back(ctx)
        return scaled_gradient(ctx.backend, grad, grad_loss, scale, *ctx.values), None, None, None
