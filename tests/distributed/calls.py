"""Calls of the functions that speak to other ranks, each with right arguments but for some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from steppo_kernels import StepLayout, rollout_weights, step_value_loss, steppo_loss
from steppo_kernels.distributed import (
    ContextShard,
    batch_reduction,
    context_linear_steppo_loss,
    merge_metrics,
    ratio_center,
    step_gae,
)

MASK = torch.tensor([[0, 1, 1, 0, 1, 1]])
LAYOUT = StepLayout.from_mask(MASK)
ZEROS = torch.zeros(1, 6)
STEPS = torch.zeros(2)


def reduction(call: dict[str, Any]) -> Any:
    return batch_reduction(**{"layouts": LAYOUT, "reduction": "trajectory_mean", **call})


def center(call: dict[str, Any]) -> Any:
    given = {"log_probs": ZEROS, "old_log_probs": ZEROS, "layouts": LAYOUT}
    return ratio_center(**{**given, **call})


def gae(call: dict[str, Any]) -> Any:
    return step_gae(**{"rewards": STEPS, "values": STEPS, "layout": LAYOUT, **call})


def metrics(call: dict[str, Any]) -> Any:
    kinds: dict[str, Callable[[], Any]] = {
        "policy": lambda: steppo_loss(ZEROS, None, STEPS, LAYOUT).metrics,
        "adds up": lambda: steppo_loss(ZEROS, None, STEPS, LAYOUT, normalizer=2.0).metrics,
        "value": lambda: step_value_loss(STEPS, STEPS, LAYOUT).metrics,
        "rollout": lambda: rollout_weights(ZEROS, ZEROS, LAYOUT, level="step").metrics,
        "none": list,
        "number": lambda: 7,
    }
    kind = call.get("kind", "policy")
    rest = {name: value for name, value in call.items() if name != "kind"}
    return merge_metrics(kinds[kind](), **rest)


def contiguous(call: dict[str, Any]) -> Any:
    return ContextShard.contiguous(**{"length": 6, **call})


def zigzag(call: dict[str, Any]) -> Any:
    return ContextShard.zigzag(**{"length": 6, "cu_seqlens": [0, 4, 6], "dim": 0, **call})


def columns(call: dict[str, Any]) -> Any:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return ContextShard.of_columns(**{"columns": list(range(6))[rank::size], "length": 6, **call})


def whole(call: dict[str, Any]) -> Any:
    make = ContextShard.zigzag if call.get("kind") == "zigzag" else ContextShard.contiguous
    shard = call.get("shard") or make(6)
    part = torch.zeros(call.get("rows", 1), len(shard.columns) + call.get("more", 0))
    parts = [part.to(dtype) for dtype in call.get("dtypes", [torch.float32])]
    return shard.whole(*[part.conj() for part in parts])


def head(call: dict[str, Any]) -> Any:
    shard = call.get("shard") or ContextShard.zigzag(6)
    own = len(shard.columns)
    given = {
        "hidden": torch.ones(1, own, *call.get("size", [3]), dtype=call.get("dtype")),
        "weight": torch.zeros(4, 3),
        "token_ids": torch.zeros(1, own, dtype=torch.int64),
        "old_log_probs": ZEROS,
        "advantages": STEPS,
        "layout": LAYOUT,
        "shard": shard,
    }
    rest = {name: value for name, value in call.items() if name not in ("size", "dtype")}
    return context_linear_steppo_loss(**{**given, **rest})
