"""Log-probs over kept sets from rows of logits, and the gradient of these.

Rows whose token is over the whole vocabulary are read as they are without sets. Of the others, the
logits of the kept ids alone are gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..backends import operators
from .kept_rows import KeptRows
from .targets import Targets


def read(
    rows: Tensor, targets: Targets, need_entropy: bool, backend: str, kept: KeptRows
) -> tuple[Tensor, ...]:
    """Return what `token_log_probs` finds in rows ``[B, T, V]``, and the logits of all pairs."""
    dtype = checks.compute_dtype(rows)
    logits = rows[_at(rows, kept)].to(dtype)
    of_sets = operators.call("kept_log_probs", backend, logits, *_call(targets, kept), need_entropy)
    found: tuple[Tensor, ...] = _of_full(rows, targets, need_entropy, backend, kept)
    for values, those in zip(found, of_sets, strict=True):
        if len(values):
            values[kept.kept] = kept.marked(those)
    return *found, logits


def _of_full(
    rows: Tensor, targets: Targets, need_entropy: bool, backend: str, kept: KeptRows
) -> tuple[Tensor, ...]:
    """Return what is found in the rows that are over the whole vocabulary, 0 in the others."""
    if len(kept.full):
        of_full = targets._replace(mask=_is_full(targets, kept))
        found: tuple[Tensor, ...] = operators.call(
            "token_log_probs", backend, rows, *of_full, need_entropy
        )
        return found
    count, dtype = targets.token_ids.numel(), checks.compute_dtype(rows)
    wide = rows.new_zeros(count, dtype=torch.float64)
    zeros = rows.new_zeros(count, dtype=dtype)
    return zeros, zeros.new_zeros(count if need_entropy else 0), wide, wide.clone()


def write(
    grad_rows: Tensor,
    rows: Tensor,
    targets: Targets,
    found: tuple[Tensor, Tensor, Tensor | None],
    grads: tuple[Tensor, Tensor | None],
    backend: str,
    kept: KeptRows,
    logits: Tensor,
) -> None:
    """Write the gradient of rows to `grad_rows`, which may be the rows themselves.

    `found` are `top`, `log_sum` and entropy, ``[N]`` as the gradients of log-probs and entropies
    are; `logits` those of the pairs.
    """
    if len(kept.full):
        # Rows without a mask are zeroed.
        of_full = targets._replace(mask=_is_full(targets, kept))
        operators.call(
            "token_log_probs_backward", backend, grad_rows, rows, *of_full, *found, *grads, None
        )
    else:
        grad_rows.zero_()
    at = kept.kept
    top, log_sum, entropy = found
    make = torch.empty_like if kept.covers_all else torch.zeros_like
    grad_logits = make(logits)
    operators.call(
        "kept_log_probs_backward",
        backend,
        grad_logits,
        logits,
        *_call(targets, kept),
        top[at],
        log_sum[at],
        None if entropy is None else entropy[at],
        kept.marked(grads[0][at]),
        None if grads[1] is None else grads[1][at],
    )
    where = _at(rows, kept)
    if len(kept.full):
        # Their tokens may have pairs, whose gradient is that of the whole vocabulary.
        is_own = torch.zeros(kept.held.num_tokens, dtype=torch.bool, device=at.device)
        is_own[at] = True
        own = is_own[kept.held.tokens]
        (row, column, ids), grad_logits = where, grad_logits[own]
        where = row[own], column[own], ids[own]
    grad_rows[where] = grad_logits.to(grad_rows.dtype)


def _call(
    targets: Targets, kept: KeptRows
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor | None, float, float]:
    every = targets.temperatures
    temperatures = None if every is None else every[kept.kept]
    scales = temperatures, targets.temperature, targets.softcap
    return kept.places, kept.kept, kept.held.sets, *scales


def _is_full(targets: Targets, kept: KeptRows) -> Tensor:
    is_full = torch.zeros(targets.token_ids.numel(), dtype=torch.bool, device=kept.full.device)
    is_full[kept.full] = True
    return is_full


def _at(rows: Tensor, kept: KeptRows) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the logits of all pairs lie in rows ``[B, T, V]``."""
    length, tokens = rows.shape[1], kept.held.tokens
    return tokens // length, tokens % length, kept.held.sets.ids.long()
