"""Log-prob and entropy of tokens from logits, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def capped_logits(
    logits: Tensor, softcap: float, dtype: torch.dtype, is_kept: Tensor | None
) -> Tensor:
    """Return ``[n, V]`` logits in `dtype`, capped, and -inf but at ids that are kept.

    `softcap` 0 caps nothing; without `is_kept` (bool ``[n, V]``) all ids are.
    """
    z = logits.to(dtype)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z if is_kept is None else z.masked_fill(~is_kept, -math.inf)


def scaled_logits(z: Tensor, temperature: float | Tensor) -> Tensor:
    """Return ``[n, V]`` capped logits over temperature, 0 at each row's largest."""
    # A softmax does not change with a shift. Divided as they are, logits could overflow, and what
    # two huge ones differ by would be rounded away.
    z = z - z.detach().amax(-1, keepdim=True)
    if isinstance(temperature, Tensor):
        return z / temperature.to(z.dtype).unsqueeze(-1)
    return z / temperature


def token_log_probs(
    logits: Tensor,
    token_ids: Tensor,
    rows: Tensor,
    temperature: float | Tensor,
    softcap: float,
    dtype: torch.dtype,
    is_kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies ``[N]`` of ``[N, V]`` logits, 0 except at `rows`.

    Log-probs are of the shape of `token_ids`, ``[N]`` or ``[N, K]``. `rows` are the positions that
    count, int64 ``[n]``; differentiable. `temperature` is a number or ``[N]``. With `is_kept`, bool
    ``[n, V]``, the softmax of a row is over those ids alone.
    """
    check_ids(token_ids[rows], logits.shape[-1])
    if isinstance(temperature, Tensor):
        temperature = temperature[rows]
    z = capped_logits(logits[rows], softcap, dtype, is_kept)
    log_p = torch.log_softmax(scaled_logits(z, temperature), -1)
    ids = token_ids[rows]
    chosen = log_p.gather(-1, ids.view(-1, ids.shape[1] if ids.dim() == 2 else 1)).view(ids.shape)
    # p log p tends to 0 with p; the product of 0 and what is, or overflows to, -inf would not.
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    zeros = torch.zeros(token_ids.shape, dtype=dtype, device=logits.device)
    of_rows = torch.zeros(len(token_ids), dtype=dtype, device=logits.device)
    return zeros.index_put((rows,), chosen), of_rows.index_put((rows,), entropy)


def check_ids(token_ids: Tensor, vocabulary: int) -> None:
    """Raise for an id out of range, where looking costs no wait for a device."""
    if token_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = (token_ids < 0) | (token_ids >= vocabulary)
        if bool(bad.any()):
            raise ValueError(
                f"token_ids: got {token_ids[bad][0].item()}, expected ids from 0 to "
                f"{vocabulary - 1}"
            )
