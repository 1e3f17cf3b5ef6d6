"""Ranks that call different functions: all of them raise, and the group works after."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import calls
import torch
from collectives import error_of
from head_cases import head_case
from heads import DRAWN, log_probs_of, shard_of, works
from torch import distributed
from worlds import Worlds

from steppo_kernels import linear_steppo_loss
from steppo_kernels.distributed import ContextShard


def functions(rank: int, size: int) -> dict[str, Callable[[], Any]]:
    """Return a call of each function, of which the first word is the next one."""
    shards = {"whole": ContextShard.contiguous(6), "context loss": ContextShard.zigzag(6)}
    case = shard_of(head_case(**DRAWN).to(torch.float64), rank, size)
    objective = case.old_log_probs, case.advantages, case.layout
    log_probs = log_probs_of(case)
    return {
        "batch_reduction": lambda: calls.reduction({}),
        "ratio_center": lambda: calls.center({}),
        "step_gae": lambda: calls.gae({}),
        "merge_metrics": lambda: calls.metrics({}),
        "ContextShard.contiguous": lambda: calls.contiguous({}),
        "ContextShard.zigzag": lambda: calls.zigzag({}),
        "ContextShard.of_columns": lambda: calls.columns({}),
        "ContextShard.whole": lambda: calls.whole({"shard": shards["whole"]}),
        "context_linear_steppo_loss": lambda: calls.head({"shard": shards["context loss"]}),
        "linear_token_log_probs": lambda: log_probs_of(case),
        "linear_token_log_probs (backward)": lambda: torch.autograd.grad(
            log_probs.sum(), case.hidden, retain_graph=True
        ),
        "linear_steppo_loss": lambda: linear_steppo_loss(
            case.hidden,
            case.weight,
            case.token_ids,
            *objective,
            tp_group=distributed.group.WORLD,
        ),
    }


def in_pairs(rank: int, size: int) -> dict[tuple[str, str], str]:
    run, heard = functions(rank, size), {}
    for pair in permutations(run, 2):
        heard[pair] = error_of(run[pair[rank]])
    for function in run.values():
        function()
    assert works(rank, size)
    return heard


def test_every_pair_of_functions(worlds: Worlds) -> None:
    first, second = worlds.run(2, in_pairs)
    assert len(first) == 12 * 11
    for pair in first:
        for errors in (first, second):
            error = errors[pair]
            assert error.startswith(("ValueError: group: ", "ValueError: tp_group: ")), (
                pair,
                error,
            )
            assert f"function is {pair[0]} on rank 0, {pair[1]} on rank 1" in error, (pair, error)
