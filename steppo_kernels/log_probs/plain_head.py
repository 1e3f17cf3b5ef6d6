"""Log-probs of a checked head in plain PyTorch: the reference, with or without shards."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..backends.reference import lm_head as reference
from .kept_rows import KeptRows
from .lm_head import Head
from .vocabulary_shard import on_every_rank


def plain_log_probs(
    hidden: Tensor, head: Head, token_ids: Tensor, index: Tensor, rows: KeptRows | None
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies ``[N]`` of ``[N, d]`` hidden states, 0 except at `index`.

    With `rows`, those of `index`, softmaxes are over their sets.
    """
    temperature = head.temperature if head.temperatures is None else head.temperatures
    dtype = checks.compute_dtype(hidden)
    given = (token_ids, index, temperature, head.softcap, dtype)
    shard = head.shard
    start = 0 if shard is None else shard.start
    is_kept = None if rows is None else rows.mask(index, start, len(head.weight))
    if shard is None:
        found = reference.linear_token_log_probs(hidden, head.weight, head.bias, *given, is_kept)
    else:
        # In the dtype of the computation: the sum of the gradients is rounded once.
        copied = on_every_rank(hidden.to(dtype), shard.call)
        found = reference.sharded_token_log_probs(
            copied,
            head.weight,
            head.bias,
            *given,
            start,
            shard.vocabulary,
            shard.gather,
            is_kept,
        )
    return found if rows is None else rows.marked_all(*found)
