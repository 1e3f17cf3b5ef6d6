"""Log-probs over kept sets from the logits of their pairs, and the gradient, in compiled code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..records import Sets, record
from .launch import DTYPES, Native, addresses, empty


def kept_log_probs(
    native: Native,
    logits: Tensor,
    places: Tensor,
    rows: Tensor,
    sets: Sequence[Tensor],
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    need_entropy: bool,
) -> tuple[Tensor, ...]:
    """Run the operator `kept_log_probs` of `steppo_kernels.backends.kept_operators`."""
    held, num_rows = record(Sets, sets), rows.numel()
    log_probs = empty(logits, num_rows, logits.dtype)
    entropy = empty(logits, num_rows if need_entropy else 0, logits.dtype)
    top, log_sum = empty(logits, num_rows, torch.float64), empty(logits, num_rows, torch.float64)
    native.kernels.kept_log_probs(
        kept_rows(logits, places, rows, temperatures, temperature, softcap),
        held.fields,
        (*addresses(log_probs, entropy, top, log_sum),),
        native.place(logits),
    )
    return log_probs, entropy, top, log_sum


def kept_log_probs_backward(
    native: Native,
    grad_logits: Tensor,
    logits: Tensor,
    places: Tensor,
    rows: Tensor,
    sets: Sequence[Tensor],
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    top: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    """Run the operator `kept_log_probs_backward` of `steppo_kernels.backends.kept_operators`."""
    held = record(Sets, sets)
    native.kernels.kept_log_probs_backward(
        kept_rows(logits, places, rows, temperatures, temperature, softcap),
        held.fields,
        (*addresses(top, log_sum, entropy, grad_log_probs, grad_entropy, grad_logits),),
        native.place(logits),
    )


def kept_rows(
    logits: Tensor,
    places: Tensor,
    rows: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
) -> tuple[float, ...]:
    """Return the tokens of a call as the record ``KeptRows``."""
    num_rows = rows.numel()
    return (
        DTYPES[logits.dtype],
        *addresses(logits, places, rows),
        num_rows,
        *addresses(temperatures),
        temperature,
        softcap,
    )
