"""Outputs of fakes that several operators share: their shapes, dtypes and devices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..outputs import NUM_POLICY_METRICS


def segments(num_tokens: int, row_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the step of each token, the first step of each row, and three counts."""
    return (
        row_offsets.new_empty((num_tokens,), dtype=torch.int32),
        row_offsets.new_empty(row_offsets.shape, dtype=torch.int64),
        row_offsets.new_empty((3,), dtype=torch.int64),
    )


def loss_outputs(
    log_probs: Tensor, need_grad: bool, need_entropy_grad: bool, backend: str
) -> tuple[Tensor, ...]:
    """Return loss, metrics, the gradients that are needed and what these lack."""
    return (
        log_probs.new_empty(()),
        log_probs.new_empty((NUM_POLICY_METRICS,), dtype=torch.float64),
        torch.empty_like(log_probs) if need_grad else log_probs.new_empty((0,)),
        torch.empty_like(log_probs) if need_entropy_grad else log_probs.new_empty((0,)),
        scale(log_probs, backend),
    )


def scale(like: Tensor, backend: str) -> Tensor:
    """Return what gradients of a loss lack; a CPU writes them whole."""
    if backend == "cpu":
        return like.new_empty((0,))
    return like.new_empty((), dtype=torch.float64)
