"""Log-probs from hidden states and the output head, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .token_log_probs import token_log_probs


def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    index: Tensor,
    temperature: float | Tensor,
    softcap: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies ``[N]`` of ``[N, d]`` hidden states, 0 except at `index`.

    Everything is computed in `dtype`; differentiable. `temperature` is a number or ``[N]``.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden[index].to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    if isinstance(temperature, Tensor):
        temperature = temperature[index]
    every = torch.arange(len(index), device=hidden.device)
    found = token_log_probs(logits, token_ids[index], every, temperature, softcap, dtype)
    zeros = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
    log_probs, entropy = (zeros.index_put((index,), values) for values in found)
    return log_probs, entropy
