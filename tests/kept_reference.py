"""The operators of kept sets in plain PyTorch and fp64, as launchers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kept_logits(
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    sets: Sequence[Tensor],
    by_id: Sequence[Tensor],
) -> None:
    pairs, is_pair, ids = _pairs(rows, sets)
    z = (hidden[rows].double().unsqueeze(1) * weight[ids].double()).sum(-1)
    if bias is not None:
        z = z + bias[ids].double()
    logits[pairs[is_pair]] = z[is_pair].to(logits.dtype)


def kept_directions(
    logits: Tensor,
    directions: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    places: Tensor,
    rows: Tensor,
    sets: Sequence[Tensor],
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
) -> None:
    """Of tokens that have a set and are in it."""
    kept_logits(logits, hidden, weight, bias, rows, sets, ())
    z, slope, _, scale = _scaled(logits, rows, sets, temperatures, temperature, softcap)
    own = torch.zeros_like(z).scatter_(1, places.unsqueeze(1), 1.0)
    grad = (own - z.softmax(-1)) * slope / scale
    ids = _pairs(rows, sets)[2]
    directions.copy_((grad.unsqueeze(-1) * weight[ids].double()).sum(1))


def scale_directions(
    grad_hidden: Tensor, directions: Tensor, grad_log_probs: Tensor, rows: Tensor
) -> None:
    grad = grad_log_probs.double().unsqueeze(1)
    scaled = torch.where(grad == 0, 0.0, grad * directions.double())
    grad_hidden[rows] = scaled.to(grad_hidden.dtype)


def kept_hidden_gradient(
    grad_hidden: Tensor, grad_logits: Tensor, weight: Tensor, rows: Tensor, sets: Sequence[Tensor]
) -> None:
    pairs, is_pair, ids = _pairs(rows, sets)
    g = torch.where(is_pair, grad_logits[pairs].double(), 0.0).unsqueeze(-1)
    terms = torch.where(g == 0, 0.0, g * weight[ids].double())
    grad_hidden[rows] = terms.sum(1).to(grad_hidden.dtype)


def kept_weight_gradient(
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    grad_logits: Tensor,
    hidden: Tensor,
    by_id: Sequence[Tensor],
    compact: bool,
) -> None:
    ids, pairs, tokens, borders, part_ids = by_id[:5]
    entry = torch.repeat_interleave(part_ids, borders.diff())
    g = grad_logits[pairs].double().unsqueeze(1)
    terms = torch.where(g == 0, 0.0, g * hidden[tokens].double())
    place = entry if compact else ids[entry].long()
    total = torch.zeros(grad_weight.shape, dtype=torch.float64, device=g.device)
    grad_weight.copy_(total.index_add_(0, place, terms))
    if grad_bias is not None:
        grad_bias.copy_(total.new_zeros(len(total)).index_add_(0, place, g.squeeze(1)))


def kept_log_probs(
    logits: Tensor,
    places: Tensor,
    rows: Tensor,
    sets: Sequence[Tensor],
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    need_entropy: bool,
) -> tuple[Tensor, ...]:
    """Of tokens that have a set and are in it."""
    z, _, top, _ = _scaled(logits, rows, sets, temperatures, temperature, softcap)
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    log_sum = torch.logsumexp(z - z.amax(-1, keepdim=True), -1)
    found = log_p.gather(1, places.unsqueeze(1)).squeeze(1)
    dtype = logits.dtype
    return found.to(dtype), entropy.to(dtype)[: None if need_entropy else 0], top, log_sum


def kept_log_probs_backward(
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
    z, slope, _, scale = _scaled(logits, rows, sets, temperatures, temperature, softcap)
    log_p = z.log_softmax(-1)
    p, log_p = log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0.0)
    c = grad_log_probs.double().unsqueeze(1)
    own = torch.zeros_like(p).scatter_(1, places.unsqueeze(1), 1.0)
    grad = c * (own - p)
    if grad_entropy is not None:
        h = -(p * log_p).sum(-1, keepdim=True)
        grad = grad - p * grad_entropy.double().unsqueeze(1) * (log_p + h)
    pairs, is_pair, _ = _pairs(rows, sets)
    grad_logits[pairs[is_pair]] = (grad * slope / scale)[is_pair].to(grad_logits.dtype)


def _scaled(
    logits: Tensor,
    rows: Tensor,
    sets: Sequence[Tensor],
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return capped logits over temperature ``[n, K]``, -inf behind a set, and what they are of."""
    pairs, is_pair, _ = _pairs(rows, sets)
    z = logits[pairs].double()
    slope = torch.ones_like(z)
    if softcap:
        t = torch.tanh(z / softcap)
        z, slope = softcap * t, 1 - t * t
    z = z.masked_fill(~is_pair, -torch.inf)
    one = torch.full((len(rows),), temperature, dtype=torch.float64, device=z.device)
    scale = (one if temperatures is None else temperatures).unsqueeze(1)
    return z / scale, slope, z.amax(-1), scale


def _pairs(rows: Tensor, sets: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs of tokens ``[n, K]``, which of them there are, and their ids."""
    ids, offsets = sets
    counts = offsets.diff()[rows]
    place = torch.arange(int(counts.max()) if len(rows) else 0, device=rows.device)
    is_pair = place < counts.unsqueeze(1)
    pairs = torch.where(is_pair, offsets[rows].unsqueeze(1) + place, 0)
    return pairs, is_pair, ids[pairs].long()
