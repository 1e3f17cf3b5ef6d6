"""The rows with a gradient, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def order_live_rows(
    grad_log_probs: Tensor, grad_entropy: Tensor | None, ascending: bool
) -> tuple[Tensor, Tensor]:
    """Run the operator `order_live_rows` of `steppo_kernels.backends.operators`."""
    is_live = grad_log_probs != 0
    if grad_entropy is not None:
        is_live = is_live | (grad_entropy != 0)
    count = is_live.sum()
    by_rank = is_live.logical_not().to(torch.uint8).argsort(stable=True)
    if ascending:
        return by_rank, count
    rank = torch.arange(len(by_rank), device=by_rank.device)
    # The live rows from row `count` on, and the dead ones before it: as many, and in their order.
    kept = (is_live & (rank < count)).sum()
    is_moved = (rank < count) & (by_rank >= count)
    holes = by_rank[torch.where(is_moved, count + rank - kept, rank)]
    places = torch.where(is_moved, holes, torch.where(rank < count, by_rank, rank))
    return torch.empty_like(by_rank).index_copy_(0, places, by_rank), count
