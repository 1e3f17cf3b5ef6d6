"""Steps to tokens and back in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def broadcast_to_tokens(per_step: Tensor, step_ids: Tensor) -> Tensor:
    """Give every action token the entry of its step, other tokens 0: ``[S]`` to ``[N]``."""
    if per_step.numel() == 0:
        return per_step.new_zeros(step_ids.numel()) + per_step.sum()
    entry = per_step[step_ids.clamp_min(0).to(torch.int64)]
    return torch.where(step_ids >= 0, entry, torch.zeros_like(entry))


def sum_over_steps(per_token: Tensor, token_index: Tensor, step_offsets: Tensor) -> Tensor:
    """Add up the tokens of each step: ``[N]`` to ``[S]``, the transpose of the broadcast."""
    if step_offsets.numel() == 1:
        return per_token[token_index]
    # It adds one after another: in fp32, a step of 100,000 tokens would lose three digits.
    every = per_token[token_index].to(torch.float64)
    return torch.segment_reduce(every, "sum", offsets=step_offsets).to(per_token.dtype)
