"""Per-step numbers on tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, ops
from .backends import Backend, resolve
from .layout import StepLayout, require_layout


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
    """
    layout = require_layout(layout)
    dtype = checks.compute_dtype(checks.floating("per_step", per_step))
    per_step = checks.vector("per_step", per_step, layout.num_steps, "step", layout.device, dtype)
    chosen = resolve(backend, layout.device)
    step_ids = layout.step_ids.view(-1)
    if per_step.requires_grad and torch.is_grad_enabled():
        flat: Tensor = _Broadcast.apply(
            per_step, step_ids, layout.token_index, layout.step_offsets, chosen
        )
    else:
        flat = ops.call("broadcast_to_tokens", chosen, per_step, step_ids)
    return flat.view(layout.shape)


class _Broadcast(torch.autograd.Function):
    """Linear: its backward is `_Sum`, whose backward it is in turn."""

    @staticmethod
    def forward(
        ctx: Any, per_step: Tensor, step_ids: Tensor, token_index: Tensor, step_offsets: Tensor,
        backend: str,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(step_ids, token_index, step_offsets)
        ctx.backend = backend
        per_token: Tensor = ops.call("broadcast_to_tokens", backend, per_step, step_ids)
        return per_token

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Sum.apply(grad, *ctx.saved_tensors, ctx.backend), None, None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, per_token: Tensor, step_ids: Tensor, token_index: Tensor, step_offsets: Tensor,
        backend: str,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(step_ids, token_index, step_offsets)
        ctx.backend = backend
        per_step: Tensor = ops.call(
            "sum_over_steps", backend, per_token.contiguous(), token_index, step_offsets
        )
        return per_step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        spread = _Broadcast.apply(grad.contiguous(), *ctx.saved_tensors, ctx.backend)
        return spread, None, None, None, None
