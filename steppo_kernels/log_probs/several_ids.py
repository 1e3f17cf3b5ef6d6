"""Log-probs of K ids a token over the whole vocabulary, and the gradient of these.

The kernels know rows with one token. They are given the likeliest of the ids as that, and the sum
of the K upstream gradients as its gradient: g_k for each id adds up to sum g_k delta_k - (sum g_k)
p, which differs from theirs in the columns of the ids alone. These are few, and are formed in fp64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.reference.token_log_probs import check_ids


class Several(NamedTuple):
    """K ids of each of n rows of logits.

    Attributes:
        ids: int64 ``[n, K]``, of the vocabulary.
        logits: fp32 or fp64 ``[n, K]``, as they are in the rows.
        is_bad: bool ``[n, K]``, which of the ids are not of the vocabulary, where nobody waits to
            raise for them.
        target: int64 ``[n]``, the likeliest of a row's ids.
    """

    ids: Tensor
    logits: Tensor
    is_bad: Tensor
    target: Tensor

    @classmethod
    def of(cls, rows: Tensor, ids: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Several:
        """Take ids ``[n, K]`` of rows ``[B, T, V]``; where `mask` is False they may be anything."""
        vocabulary = rows.shape[-1]
        if mask is not None:
            ids = torch.where(mask.unsqueeze(1), ids, 0)
        check_ids(ids, vocabulary)
        is_bad = (ids < 0) | (ids >= vocabulary)
        ids = torch.where(is_bad, 0, ids)
        logits = rows[places(rows, ids)].to(dtype)
        best = logits.masked_fill(is_bad, -torch.inf).argmax(1, keepdim=True)
        return cls(ids, logits, is_bad, ids.gather(1, best).squeeze(1))

    def log_probs(
        self,
        of_target: Tensor,
        top: Tensor,
        log_sum: Tensor,
        temperature: float | Tensor,
        softcap: float,
    ) -> Tensor:
        """Return log-probs ``[n, K]`` of the ids from what is found in rows with their target."""
        z, _ = _capped(self.logits, softcap)
        log_p = (z - top.unsqueeze(1)) / _by_row(temperature) - log_sum.unsqueeze(1)
        # That of the kernel is accurate too where it is close to 0.
        is_target = self.ids == self.target.unsqueeze(1)
        log_p = torch.where(is_target, of_target.unsqueeze(1).to(log_p.dtype), log_p)
        # A conversion to the dtype that is there already may not come last: compiled by torch 2.11,
        # an output of an autograd function that is another name of a tensor has no gradient.
        return log_p.to(of_target.dtype).masked_fill(self.is_bad, torch.nan)

    def of_rows(self, grad: Tensor) -> Tensor:
        """Return the upstream gradients ``[n]`` of rows with their target."""
        return grad.sum(1).masked_fill(self.is_bad.any(1), torch.nan)

    def write_columns(
        self,
        grad_rows: Tensor,
        log_probs: Tensor,
        grad: Tensor,
        grad_entropy: Tensor | None,
        entropy: Tensor | None,
        mask: Tensor | None,
        temperature: float | Tensor,
        softcap: float,
    ) -> None:
        """Write the columns of the ids to gradients ``[B, T, V]`` that know of their target alone.

        `log_probs` and their upstream gradients `grad` are ``[n, K]``.
        """
        _, slope = _capped(self.logits, softcap)
        log_p, g = log_probs.double(), grad.double()
        ids, order = self.ids.sort(dim=1, stable=True)
        total, own = g.sum(1, keepdim=True), _sums_of_equals(ids, g.gather(1, order))
        log_p, slope = log_p.gather(1, order), slope.gather(1, order)
        p = log_p.exp()
        # Of a likely id, 1 - p is left of its own gradient.
        value = -own * torch.expm1(log_p) - p * (total - own)
        if grad_entropy is not None and entropy is not None:
            e, h = grad_entropy.double().unsqueeze(1), entropy.double().unsqueeze(1)
            value = value - torch.where(p > 0, p * e * (log_p + h), 0.0)
        value = value * slope / _by_row(temperature)
        if mask is not None:
            value = torch.where(mask.unsqueeze(1), value, 0.0)
        grad_rows[places(grad_rows, ids)] = value.to(grad_rows.dtype)


def places(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return where ids ``[n, K]`` of all rows lie in ``[B, T, V]``."""
    number = torch.arange(len(ids), device=ids.device).unsqueeze(1)
    return number // rows.shape[1], number % rows.shape[1], ids


def _capped(logits: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Return logits in fp64, capped, and the derivative of that."""
    z = logits.double()
    if not softcap:
        return z, torch.ones_like(z)
    t = torch.tanh(z / softcap)
    return softcap * t, 1 - t * t


def _by_row(temperature: float | Tensor) -> float | Tensor:
    return temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature


def _sums_of_equals(ids: Tensor, values: Tensor) -> Tensor:
    """Return the sum of the values ``[n, K]`` of each entry's equals; ids ascend in a row.

    Entries that are equal get the same bits, on a GPU too: nothing is added up by atomics.
    """
    count, step, sums = ids.shape[1], 1, values
    while step < count:
        is_equal = ids[:, step:] == ids[:, :-step]
        earlier = torch.where(is_equal, sums[:, :-step], 0.0)
        sums = torch.cat((sums[:, :step], sums[:, step:] + earlier), 1)
        step *= 2
    last = torch.searchsorted(ids, ids, right=True) - 1
    return sums.gather(1, last)
