"""Log-probs from hidden states and the output head, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .token_log_probs import capped_logits, check_ids, scaled_logits, token_log_probs
from .vocabulary_shard import combined, local_ids, told_of_rows


def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    index: Tensor,
    temperature: float | Tensor,
    softcap: float,
    dtype: torch.dtype,
    is_kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies ``[N]`` of ``[N, d]`` hidden states, 0 except at `index`.

    Everything is computed in `dtype`; differentiable. `temperature` is a number or ``[N]``. With
    `is_kept`, bool ``[n, V]`` for the n rows of `index`, softmaxes are over those ids alone.
    """
    logits, temperature = _logits(hidden, weight, bias, index, temperature, dtype)
    every = torch.arange(len(index), device=hidden.device)
    found = token_log_probs(logits, token_ids[index], every, temperature, softcap, dtype, is_kept)
    log_probs, entropy = (
        values.new_zeros((len(hidden), *values.shape[1:])).index_put((index,), values)
        for values in found
    )
    return log_probs, entropy


def sharded_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    index: Tensor,
    temperature: float | Tensor,
    softcap: float,
    dtype: torch.dtype,
    start: int,
    vocabulary: int,
    gather: Callable[[Tensor], Tensor],
    is_kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `linear_token_log_probs` of a weight of which this rank holds rows from `start` on.

    `gather` returns what each rank tells, and the gradient goes to this rank's part: the gradient
    of `hidden` is that of these rows of the weight, and is to be added up over the ranks.
    """
    logits, temperature = _logits(hidden, weight, bias, index, temperature, dtype)
    ids = token_ids[index]
    check_ids(ids, vocabulary)
    columns, is_away = local_ids(ids, start, len(weight))
    if len(weight):
        capped = capped_logits(logits, softcap, dtype, is_kept)
        top = capped.detach().amax(-1)
        # Ids of probability 0 have no gradient, and what they differ by is no number.
        is_out = top == -math.inf
        z = scaled_logits(torch.where(is_out.unsqueeze(-1), 0.0, capped), temperature)
        log_sum = torch.logsumexp(z, -1)
        log_p = z - log_sum.unsqueeze(-1)
        chosen = log_p.gather(-1, columns.unsqueeze(-1)).squeeze(-1)
        p = log_p.exp()
        entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
        log_sum = log_sum.masked_fill(is_out, -math.inf)
    else:
        # Without a column, but with a graph.
        chosen = entropy = logits.sum(-1)
        top = log_sum = torch.full_like(chosen.detach(), -math.inf)
    every = gather(told_of_rows(top, log_sum, chosen, entropy, is_away))
    found = combined(every, temperature)[:2]
    zeros = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
    log_probs, entropy = (zeros.index_put((index,), values.to(dtype)) for values in found)
    return log_probs, entropy


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    temperature: float | Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, float | Tensor]:
    """Return the logits ``[n, V]`` of the rows at `index`, and their temperature."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden[index].to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    return logits, temperature[index] if isinstance(temperature, Tensor) else temperature
