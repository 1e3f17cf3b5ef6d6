"""A weight that is sharded over ranks: it is refused, and what the error advises is right."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import worlds

from steppo_kernels import linear_token_log_probs

RANKS = 2
ADVICE = r'full_tensor\(grad_placements=\[Partial\("avg"\)\]\), or Partial\("sum"\)'


def on_a_rank(rank: int, rendezvous: str) -> None:
    """Compare gradients of a gathered weight with the mean and the sum of those of the ranks."""
    from datetime import timedelta

    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Shard, distribute_tensor

    torch.set_num_threads(1)
    # A rank whose neighbour failed waits no longer than this.
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=30),
    )
    random = torch.Generator().manual_seed(0)
    whole = torch.randn(10, 4, generator=random, dtype=torch.float64)
    hidden = torch.randn(RANKS, 6, 4, generator=random, dtype=torch.float64)
    ids = torch.randint(10, (RANKS, 6), generator=random)
    own = [
        torch.autograd.functional.jacobian(
            lambda weight, r=r: linear_token_log_probs(hidden[r], weight, ids[r]).sum(), whole
        )
        for r in range(RANKS)
    ]
    mesh = init_device_mesh("cpu", (RANKS,))
    sharded = distribute_tensor(whole, mesh, [Shard(0)]).requires_grad_()
    with pytest.raises(
        TypeError,
        match=rf"^weight: got a DTensor, expected a whole .*{ADVICE}.* come with tp_group$",
    ):
        linear_token_log_probs(hidden[rank], sharded, ids[rank])
    for placements, expected in (
        ([Partial("avg")], (own[0] + own[1]) / 2),
        ([Partial("sum")], own[0] + own[1]),
    ):
        weight = sharded.full_tensor(grad_placements=placements)
        linear_token_log_probs(hidden[rank], weight, ids[rank]).sum().backward()
        torch.testing.assert_close(sharded.grad.full_tensor(), expected)
        sharded.grad = None
    # What the error must not advise: rows of a rank have the gradient of that rank.
    linear_token_log_probs(hidden[rank], sharded.full_tensor(), ids[rank]).sum().backward()
    half = 5 * rank
    torch.testing.assert_close(sharded.grad.to_local(), own[rank][half : half + 5])
    distributed.destroy_process_group()
    # Not through Python's own exit, in which a thread of gloo now and again ends the process.
    os._exit(0)


def test_the_advice_of_the_error(tmp_path: Any) -> None:
    worlds.spawn(on_a_rank, tmp_path, RANKS)
