"""Attention of a model whose ranks have some columns of each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from steppo_kernels.distributed import ContextShard


class _OfAllRanks(torch.autograd.Function):
    """What ranks have along a dimension; each makes something else of it: gradients add up."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, dim: int, shard: ContextShard) -> Tensor:
        ctx.dim, ctx.columns = dim, shard.columns
        return shard.whole(own.movedim(dim, 1)).movedim(1, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.contiguous().clone()
        distributed.all_reduce(total)
        return total.index_select(ctx.dim, ctx.columns), None, None


def of_all_ranks(own: Tensor, dim: int, shard: ContextShard) -> Tensor:
    """Return keys or values of all tokens, which are along `dim`, from those of each rank."""
    found: Tensor = _OfAllRanks.apply(own, dim, shard)
    return found


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend to the columns of all ranks that are not later, as a function of transformers does.

    Keys and values ``[B, H, T_r, D]`` go to all ranks. Rows are split in zigzag, and not padded on
    the left.
    """
    count = torch.tensor(key.shape[2])
    distributed.all_reduce(count)
    shard = ContextShard.zigzag(int(count))
    group = query.shape[1] // key.shape[1]
    every_key, every_value = (
        of_all_ranks(one, 2, shard).repeat_interleave(group, dim=1) for one in (key, value)
    )
    scores = query @ every_key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    is_later = torch.arange(shard.length) > shard.columns.unsqueeze(1)
    scores = scores.masked_fill(is_later, float("-inf"))
    made = scores.softmax(-1) @ every_value
    return made.transpose(1, 2).contiguous(), None
