"""Log-prob and entropy of tokens from logits, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_logits(
    logits: Tensor, temperature: float | Tensor, softcap: float, dtype: torch.dtype
) -> Tensor:
    """Return ``[n, V]`` logits in `dtype`, capped and over temperature, 0 at each row's largest.

    `softcap` 0 caps nothing.
    """
    z = logits.to(dtype)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    # A softmax does not change with a shift. Divided as they are, logits could overflow, and what
    # two huge ones differ by would be rounded away.
    z = z - z.detach().amax(-1, keepdim=True)
    if isinstance(temperature, Tensor):
        return z / temperature.to(dtype).unsqueeze(-1)
    return z / temperature


def token_log_probs(
    logits: Tensor,
    token_ids: Tensor,
    rows: Tensor,
    temperature: float | Tensor,
    softcap: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies ``[N]`` of ``[N, V]`` logits, 0 except at `rows`.

    `rows` are the positions that count, int64; differentiable. `temperature` is a number or
    ``[N]``.
    """
    check_ids(token_ids[rows], logits.shape[-1])
    if isinstance(temperature, Tensor):
        temperature = temperature[rows]
    log_p = torch.log_softmax(scaled_logits(logits[rows], temperature, softcap, dtype), -1)
    chosen = log_p.gather(-1, token_ids[rows].unsqueeze(-1)).squeeze(-1)
    # p log p tends to 0 with p; the product of 0 and what is, or overflows to, -inf would not.
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    zeros = torch.zeros(len(token_ids), dtype=dtype, device=logits.device)
    return zeros.index_put((rows,), chosen), zeros.index_put((rows,), entropy)


def check_ids(token_ids: Tensor, vocabulary: int) -> None:
    """Raise for an id out of range, where looking costs no wait for a device."""
    if token_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = (token_ids < 0) | (token_ids >= vocabulary)
        if bool(bad.any()):
            raise ValueError(
                f"token_ids: got {token_ids[bad][0].item()}, expected ids from 0 to "
                f"{vocabulary - 1}"
            )
