"""Per-step numbers on tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import operators
from ..backends.choice import Backend, resolve
from ..backends.derivatives import refuse_batches, wants_gradient
from ..backends.untraced import traced
from .step_layout import StepLayout, require_layout
from .step_tensors import StepTensors


@traced
def broadcast_to_tokens(
    per_step: Tensor, layout: StepLayout, *, backend: Backend = "auto"
) -> Tensor:
    """Give every action token the entry of its step; other tokens get 0.

    Args:
        per_step: floating ``[S]``; gradients flow back to it, summed over the tokens of a step.
        layout: the steps.
        backend: implementation.

    Returns:
        A tensor of the token shape, fp32 (fp64 if `per_step` is).

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument.

    Example:
        >>> import torch
        >>> from steppo_kernels import StepLayout, broadcast_to_tokens
        >>> layout = StepLayout.from_mask(torch.tensor([[0, 1, 1, 0, 1]]))
        >>> broadcast_to_tokens(torch.tensor([0.5, 2.0]), layout).tolist()
        [[0.0, 0.5, 0.5, 0.0, 2.0]]
    """
    steps = require_layout(layout)
    dtype = checks.compute_dtype(checks.floating("per_step", per_step))
    per_step = checks.vector("per_step", per_step, steps.num_steps, "step", steps.device, dtype)
    chosen = resolve(backend, steps.device)
    step_ids = steps.step_ids.view(-1)
    if wants_gradient(per_step):
        flat: Tensor = _Linear.apply(
            per_step, step_ids, steps.token_index, steps.step_offsets, True, chosen
        )
    else:
        flat = operators.call("broadcast_to_tokens", chosen, per_step, step_ids)
    return flat.view(steps.shape)


def sum_over_steps(per_token: Tensor, steps: StepTensors, backend: str) -> Tensor:
    """Add up the action tokens of each step: ``[N]`` to ``[S]``, 0 of an empty step.

    Gradients flow back to `per_token`, also those of second derivatives. Other tokens are not read,
    and get gradient 0. `backend` is one that `resolve` returned.
    """
    index, offsets = steps.token_index, steps.step_offsets
    summed: Tensor
    if wants_gradient(per_token):
        summed = _Linear.apply(per_token, steps.step_ids.view(-1), index, offsets, False, backend)
    else:
        summed = operators.call("sum_over_steps", backend, per_token, index, offsets)
    return summed


class _Linear(torch.autograd.Function):
    """Steps to tokens, or its transpose: each is the backward of the other."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        step_ids: Tensor,
        token_index: Tensor,
        step_offsets: Tensor,
        to_tokens: bool,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(step_ids, token_index, step_offsets)
        ctx.to_tokens, ctx.backend = to_tokens, backend
        moved: Tensor = (
            operators.call("broadcast_to_tokens", backend, values, step_ids)
            if to_tokens
            else operators.call("sum_over_steps", backend, values, token_index, step_offsets)
        )
        return moved

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_batches(grad)
        back = _Linear.apply(
            grad.resolve_neg().contiguous(), *ctx.saved_tensors, not ctx.to_tokens, ctx.backend
        )
        return back, None, None, None, None, None
