"""Attention of a model whose ranks have some columns of each row, and log-probs of all columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def columns_of(rank: int, size: int, length: int) -> Tensor:
    """Return the columns of a rank: a chunk from the begin and its counterpart from the end."""
    chunks = torch.arange(length).tensor_split(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


class _OfAllRanks(torch.autograd.Function):
    """What ranks have along a dimension, in the order of the columns of the whole."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, dim: int, length: int, is_summed: bool) -> Tensor:
        size, rank = distributed.get_world_size(), distributed.get_rank()
        columns = [columns_of(one, size, length) for one in range(size)]
        shape = [*own.shape]
        made = []
        for one in range(size):
            shape[dim] = len(columns[one])
            made.append(own.new_empty(shape))
            if one == rank:
                made[one].copy_(own)
            distributed.broadcast(made[one], one)
        ctx.dim, ctx.is_summed, ctx.columns = dim, is_summed, columns[rank]
        order = torch.cat(columns).argsort()
        return torch.cat(made, dim).index_select(dim, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = grad.contiguous().clone()
        if ctx.is_summed:
            distributed.all_reduce(grad)
        return grad.index_select(ctx.dim, ctx.columns), None, None, None


def of_all_columns(own: Tensor, length: int) -> Tensor:
    """Return ``[B, T]`` of which all ranks make the same loss; `ContextShard.whole` does as much.

    A gradient of the loss is the same on all ranks then, and each takes its own columns of it.
    """
    made: Tensor = _OfAllRanks.apply(own, 1, length, False)
    return made


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

    Keys and values ``[B, H, T_r, D]`` go to all ranks, whose gradients of them add up. Rows are not
    padded on the left.
    """
    size, rank = distributed.get_world_size(), distributed.get_rank()
    count = torch.tensor(key.shape[2])
    distributed.all_reduce(count)
    length = int(count)
    every_key, every_value = (_OfAllRanks.apply(one, 2, length, True) for one in (key, value))
    group = query.shape[1] // key.shape[1]
    every_key, every_value = (
        one.repeat_interleave(group, dim=1) for one in (every_key, every_value)
    )
    scores = query @ every_key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    is_later = torch.arange(length) > columns_of(rank, size, length).unsqueeze(1)
    scores = scores.masked_fill(is_later, float("-inf"))
    made = scores.softmax(-1) @ every_value
    return made.transpose(1, 2).contiguous(), None
