"""Log-probs of tokens from logits, and the gradient of these, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import address, dtype_code, empty, kernels, pointer, threads


def token_log_probs(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    need_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the operator `token_log_probs` of `steppo_kernels.backends.operators`."""
    tokens = token_ids.numel()
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_probs = empty(tokens, dtype)
    entropy = empty(tokens if need_entropy else 0, dtype)
    top, log_sum = empty(tokens, torch.float64), empty(tokens, torch.float64)
    bad_row = empty((), torch.int64)
    kernels.token_log_probs(
        dtype_code(logits),
        *_strided(logits),
        *logits.shape[1:2],
        tokens,
        logits.shape[2],
        pointer(token_ids),
        pointer(mask),
        pointer(temperatures),
        temperature,
        softcap,
        pointer(log_probs),
        pointer(entropy),
        pointer(top),
        pointer(log_sum),
        pointer(bad_row),
        threads(),
    )
    _raise_for(bad_row, token_ids, logits)
    return log_probs, entropy, top, log_sum


def token_log_probs_backward(
    grad_logits: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    top: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    rows: Tensor | None,
) -> None:
    """Run the operator `token_log_probs_backward` of `steppo_kernels.backends.operators`."""
    bad_row = empty((), torch.int64)
    kernels.token_log_probs_backward(
        dtype_code(grad_logits),
        *_strided(grad_logits),
        dtype_code(logits),
        *_strided(logits),
        *logits.shape[1:],
        pointer(token_ids),
        pointer(mask),
        pointer(temperatures),
        temperature,
        softcap,
        pointer(top),
        pointer(log_sum),
        pointer(entropy),
        pointer(grad_log_probs),
        pointer(grad_entropy),
        pointer(rows),
        token_ids.numel() if rows is None else rows.numel(),
        pointer(bad_row),
        threads(),
    )
    _raise_for(bad_row, token_ids, logits)


def _strided(logits: Tensor) -> tuple[int, int, int]:
    return address(logits), logits.stride(0), logits.stride(1)


def _raise_for(bad_row: Tensor, token_ids: Tensor, logits: Tensor) -> None:
    row = int(bad_row)
    if row >= 0:
        raise ValueError(
            f"token_ids: got {int(token_ids[row])}, expected ids from 0 to {logits.shape[2] - 1}"
        )
