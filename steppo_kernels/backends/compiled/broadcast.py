"""Steps to tokens and back in compiled code."""

from __future__ import annotations

from torch import Tensor

from .launch import DTYPES, Native, addresses, empty


def broadcast_to_tokens(native: Native, per_step: Tensor, step_ids: Tensor) -> Tensor:
    """Give every action token the entry of its step, other tokens 0: ``[S]`` to ``[N]``."""
    num_tokens = step_ids.numel()
    per_token = empty(per_step, num_tokens, per_step.dtype)
    broadcast = (
        DTYPES[per_step.dtype],
        *addresses(per_step, step_ids),
        num_tokens,
        *addresses(per_token),
    )
    native.kernels.broadcast_to_tokens(broadcast, native.place(per_step))
    return per_token


def sum_over_steps(
    native: Native, per_token: Tensor, token_index: Tensor, step_offsets: Tensor
) -> Tensor:
    """Add up the tokens of each step: ``[N]`` to ``[S]``, the transpose of the broadcast."""
    num_steps = step_offsets.numel() - 1
    per_step = empty(per_token, num_steps, per_token.dtype)
    sums = (
        DTYPES[per_token.dtype],
        *addresses(per_token, token_index, step_offsets),
        num_steps,
        *addresses(per_step),
    )
    native.kernels.sum_over_steps(sums, native.place(per_token))
    return per_step
