"""Log-probs of tokens from logits, and the gradient of these, in compiled code."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import DTYPES, Native, addresses, empty, start


def token_log_probs(
    native: Native,
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    need_entropy: bool,
) -> tuple[Tensor, ...]:
    """Run the operator `token_log_probs` of `steppo_kernels.backends.operators`."""
    num_rows = token_ids.numel()
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_probs = empty(logits, num_rows, dtype)
    entropy = empty(logits, num_rows if need_entropy else 0, dtype)
    top, log_sum = empty(logits, num_rows, torch.float64), empty(logits, num_rows, torch.float64)
    bad_row = _bad_row(native, logits)
    native.kernels.token_log_probs(
        _rows(logits, num_rows),
        (*addresses(token_ids, mask, temperatures), temperature, softcap),
        (*addresses(log_probs, entropy, top, log_sum, bad_row),),
        native.place(logits),
    )
    _raise_for(bad_row, token_ids, logits)
    return log_probs, entropy, top, log_sum


def token_log_probs_backward(
    native: Native,
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
    source, bad_row = rows, _bad_row(native, grad_logits)
    num_rows = token_ids.numel() if source is None else source.numel()
    native.kernels.token_log_probs_backward(
        _rows(grad_logits, num_rows),
        _rows(logits, token_ids.numel()),
        (*addresses(token_ids, mask, temperatures), temperature, softcap),
        (*addresses(top, log_sum, entropy, grad_log_probs, grad_entropy, source, bad_row),),
        native.place(grad_logits),
    )
    _raise_for(bad_row, token_ids, logits)


def _rows(logits: Tensor, num_rows: int) -> tuple[int, ...]:
    """Return ``[B, T, V]`` logits, or their gradient, as the record ``LogitRows``."""
    outer_stride, inner_stride, _ = logits.stride()
    _, length, vocabulary = logits.shape
    return (
        DTYPES[logits.dtype],
        start(logits),
        outer_stride,
        inner_stride,
        length,
        num_rows,
        vocabulary,
    )


def _bad_row(native: Native, like: Tensor) -> Tensor | None:
    """Return where a kernel writes the first row whose id is out of range, or -1.

    None if the answer would have to be waited for: such a row is NaN, whoever asks.
    """
    return empty(like, (), torch.int64) if native.is_done else None


def _raise_for(bad_row: Tensor | None, token_ids: Tensor, logits: Tensor) -> None:
    if bad_row is not None and (row := int(bad_row)) >= 0:
        raise ValueError(
            f"token_ids: got {int(token_ids[row])}, expected ids from 0 to {logits.shape[2] - 1}"
        )
