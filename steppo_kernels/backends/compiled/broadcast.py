"""Steps to tokens and back in C++."""

from __future__ import annotations

from torch import Tensor

from .launch import dtype_code, kernels, pointer, threads


def broadcast_to_tokens(per_step: Tensor, step_ids: Tensor) -> Tensor:
    """Give every action token the entry of its step, other tokens 0: ``[S]`` to ``[N]``."""
    per_token = per_step.new_empty(step_ids.numel())
    kernels.broadcast_to_tokens(
        dtype_code(per_step),
        pointer(per_step),
        pointer(step_ids),
        step_ids.numel(),
        pointer(per_token),
        threads(),
    )
    return per_token


def sum_over_steps(per_token: Tensor, token_index: Tensor, step_offsets: Tensor) -> Tensor:
    """Add up the tokens of each step: ``[N]`` to ``[S]``, the transpose of the broadcast."""
    num_steps = step_offsets.numel() - 1
    per_step = per_token.new_empty(num_steps)
    kernels.sum_over_steps(
        dtype_code(per_token),
        pointer(per_token),
        pointer(token_index),
        pointer(step_offsets),
        num_steps,
        pointer(per_step),
        threads(),
    )
    return per_step
