"""Log-probs and entropies of a vocabulary whose parts lie on several ranks, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# What a rank tells of a row: see `combined`.
COLUMNS = 4


def local_ids(token_ids: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Return ids as columns of the part that begins at `start`, and which lie in another part.

    The latter have column 0.
    """
    columns = token_ids - start
    is_away = (columns < 0) | (columns >= count)
    return columns.masked_fill(is_away, 0), is_away


def told_of_rows(
    top: Tensor, log_sum: Tensor, log_probs: Tensor, entropy: Tensor | None, is_away: Tensor
) -> Tensor:
    """Return what a rank tells of its part of n rows: fp64 ``[n, COLUMNS]``, see `combined`."""
    columns = (
        top,
        log_sum,
        log_probs.masked_fill(is_away, math.inf),
        torch.zeros_like(top) if entropy is None else entropy,
    )
    return torch.stack([column.to(torch.float64) for column in columns], 1)


def combined(every: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probs, entropies, largest logits and log-sums of rows, fp64 ``[n]``.

    Args:
        every: fp64 ``[R, n, COLUMNS]``: of the columns that each of R ranks holds, the largest
            logit, the log of the sum of e^(z - z_top) of the logits over temperature, the log-prob
            of the token (infinite if it is on another rank) and the entropy.
        temperature: a number, or fp64 ``[n]``.
    """
    tops, log_sums, log_probs, entropies = every.unbind(-1)
    # Columns that are all ruled out have no largest one.
    tops = tops.masked_fill(log_sums == -math.inf, -math.inf)
    top = tops.detach().amax(0)
    # The log of what a rank adds to the sum around the largest logit of all.
    shares = log_sums + torch.where(tops == -math.inf, -math.inf, (tops - top) / temperature)
    log_sum = torch.logsumexp(shares, 0)
    is_home = log_probs != math.inf
    log_probs = torch.where(is_home & (tops == -math.inf), -math.inf, log_probs)

    def at_home(values: Tensor) -> Tensor:
        return torch.where(is_home, values, 0.0).sum(0)

    # The log-prob among the columns of its rank, less what the others take away: that is accurate
    # also where the token is almost certain.
    others = torch.logsumexp(torch.where(is_home, -math.inf, shares), 0)
    excess = others - at_home(shares)
    log_prob = at_home(log_probs) - torch.logaddexp(torch.zeros_like(excess), excess)
    log_prob = torch.where(is_home.any(0), log_prob, math.nan)
    # H = sum q (H_r - log q) with q the probability of the columns of rank r.
    log_q = shares - log_sum
    q = log_q.exp()
    is_none = q == 0
    terms = q * (entropies - log_q.masked_fill(is_none, 0.0))
    return log_prob, terms.masked_fill(is_none, 0.0).sum(0), top, log_sum


def gradient_without_token(
    logits: Tensor,
    temperature: float | Tensor,
    softcap: float,
    top: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Return the gradient of logits ``[n]`` of one column that is not that of the token, fp64.

    The arguments are those of the operator `token_log_probs_backward`.
    """
    z, slope = logits.to(torch.float64), 1.0 / temperature
    if softcap:
        bend = torch.tanh(z / softcap)
        z, slope = softcap * bend, slope * (1 - bend.square())
    log_p = (z - top) / temperature - log_sum
    p = log_p.exp()
    rise = grad_log_probs.to(torch.float64)
    if grad_entropy is not None and entropy is not None:
        rise = rise + grad_entropy * (log_p.masked_fill(p == 0, 0.0) + entropy)
    return -p * rise * slope
