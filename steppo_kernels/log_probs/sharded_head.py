"""What a call with `tp_group` does before and around the head: arguments, and the first word."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..ranks import Call, Ranks
from .lm_head import Head, check_chunk, chunk_budget, logits_dtype
from .token_support import TokenSupport
from .vocabulary_shard import Shard, local_hidden, local_rows

# More than any vocabulary has; ranks exchange numbers of 64 bits.
_MOST_IDS = 2**62


def on_shards(
    function: str, tp_group: Any, vocab_start: int | None
) -> AbstractContextManager[Call | None]:
    """Return the context of a call of the ranks of `tp_group`; without one, that of None."""
    if tp_group is not None:
        return Call(function, "tp_group", Ranks.of("tp_group", tp_group))
    if vocab_start is not None:
        raise ValueError("vocab_start: got it without tp_group, expected None or both")
    return nullcontext()


def localized(
    hidden: Any, weight: Any, bias: Any, vocab_start: int | None, ranks: Ranks
) -> tuple[Any, Any, Any, int | None]:
    """Return this rank's part of DTensors, and where its rows of the weight begin."""
    if vocab_start is not None:
        vocab_start = checks.count("vocab_start", vocab_start, 0)
        if vocab_start > _MOST_IDS:
            raise ValueError(f"vocab_start: got {vocab_start}, expected at most {_MOST_IDS}")
    weight, start = local_rows("weight", weight, ranks)
    bias, bias_start = local_rows("bias", bias, ranks)
    if None not in (start, bias_start) and start != bias_start:
        raise ValueError(f"bias: got rows from {bias_start} on, expected {start} as of weight")
    if start is not None and vocab_start not in (None, start):
        raise ValueError(
            f"vocab_start: got {vocab_start} with a weight whose rows begin at {start}, expected "
            "None or that"
        )
    hidden = local_hidden("hidden", hidden, ranks)
    return hidden, weight, bias, start if vocab_start is None else vocab_start


def shared(
    head: Head,
    call: Call,
    vocab_start: int | None,
    hidden: Tensor,
    chunk_tokens: int | None,
    num_rows: int,
    need_entropy: bool,
    support: TokenSupport | None,
    facts: Mapping[str, object] | None = None,
) -> Head:
    """Return the head as a shard, after all ranks have said that they were given the same.

    `facts` are what they must know beside the head and its ``[N, d]`` hidden states. The next words
    are those of chunks of `num_rows` rows, and one that says that nothing failed.
    """
    weight = head.weight
    told: dict[str, object] = {
        "shape of hidden": tuple(hidden.shape),
        "dtype": hidden.dtype,
        "dtype of weight": weight.dtype,
        "rows": num_rows,
        "chunk_tokens": chunk_tokens,
        "bytes of a chunk": chunk_budget(hidden.device) if chunk_tokens is None else "not used",
        "dtype of logits": logits_dtype(head.backend, weight.dtype),
        "reference": head.backend == "reference",
        "bias": head.bias is not None,
        "temperature": head.temperature if head.temperatures is None else "by token",
        "softcap": head.softcap,
        "entropy": need_entropy,
        "ids in support": "none" if support is None else support.num_pairs,
        "missing": "none" if support is None else support.missing,
        "sets": "none" if support is None else support._held.digest,
        "gradients": torch.is_grad_enabled(),
        "gradient of hidden": hidden.requires_grad,
        "gradient of weight": weight.requires_grad,
        "gradient of bias": head.bias is not None and head.bias.requires_grad,
        **(facts or {}),
    }
    shard = Shard.agreed(call, vocab_start, len(weight), told)
    head = head._replace(shard=shard)
    if head.backend == "reference":
        # All rows at once, with their entropies.
        shard.open(num_rows, True, hidden.device)
        return head
    if support is not None:
        # All rows that are over their sets come at once.
        shard.open(num_rows, need_entropy, hidden.device)
        return head
    chunk = check_chunk(chunk_tokens, num_rows, head)
    shard.open(min(chunk, num_rows), need_entropy, hidden.device)
    return head


def again(function: str, shard: Shard | None) -> AbstractContextManager[Call | None]:
    """Return the context of another call of the ranks of a shard, that of a backward pass."""
    if shard is None:
        return nullcontext()
    return Call(f"{function} (backward)", shard.call.name, shard.call.ranks)
