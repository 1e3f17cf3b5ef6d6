"""The account of what ranks send is what they are counted to send."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from collectives import counted
from head_cases import head_case
from heads import shard_of
from torch import distributed
from worlds import Worlds

from steppo_kernels import StepPOConfig, linear_steppo_loss, linear_token_log_probs

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.scaling import account

_DRAWN = {"seed": 6, "rows": 3, "length": 30, "vocabulary": 26, "size": 5}
_WIDE = StepPOConfig(clip_low=0.9, clip_high=9.0)


def told_by_heads(
    rank: int, size: int, dtype: torch.dtype, chunk: int
) -> dict[str, list[tuple[str, int]]]:
    case = shard_of(head_case(**_DRAWN).to(dtype), rank, size)
    options = {"chunk_tokens": chunk, "tp_group": distributed.group.WORLD}
    given = case.hidden, case.weight, case.token_ids
    objective = case.old_log_probs, case.advantages, case.layout
    found = {}
    with counted() as found["loss"]:
        linear_steppo_loss(*given, *objective, config=_WIDE, **options)
    with counted() as found["log-probs"]:
        log_probs = linear_token_log_probs(*given, mask=case.mask, **options)
    with counted() as found["backward"]:
        log_probs.sum().backward()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("size", "chunk"), [(2, 16), (3, 16), (3, 1000)])
def test_sharded_heads(worlds: Worlds, size: int, chunk: int, dtype: torch.dtype) -> None:
    case = head_case(**_DRAWN)
    rows, lengths = case.layout.num_tokens, case.layout.step_lengths.tolist()
    assert max(lengths) <= chunk, "a step is longer than a chunk"
    chunks, filled = 1, 0
    for length in lengths:
        chunks, filled = (
            (chunks, filled + length) if filled + length <= chunk else (chunks + 1, length)
        )
    head = account.Head(
        rows, case.hidden.shape[-1], min(chunk, rows), False, live=rows, itemsize=dtype.itemsize
    )
    assert math.ceil(rows / chunk) <= chunks
    wanted = {
        "loss": head.loss(chunks),
        "log-probs": head.log_probs(),
        "backward": head.log_probs_backward(),
    }
    for found in worlds.run(size, told_by_heads, dtype, chunk):
        for name, sent in wanted.items():
            counts = Counter(found[name])
            assert counts == Counter({(one.collective, one.bytes): one.count for one in sent}), name
