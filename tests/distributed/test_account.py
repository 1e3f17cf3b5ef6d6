"""The account of what ranks send is what they are counted to send."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from collectives import counted
from head_cases import head_case
from heads import evaluations, shard_of
from torch import distributed
from worlds import Worlds

from benchmarks.scaling import account
from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    linear_steppo_loss,
    linear_token_log_probs,
    steppo_loss,
)
from steppo_kernels.distributed import (
    ContextShard,
    batch_reduction,
    merge_metrics,
    ratio_center,
    step_gae,
)

_DRAWN = {"seed": 6, "rows": 3, "length": 30, "vocabulary": 26, "size": 5}
_WIDE = StepPOConfig(clip_low=0.9, clip_high=9.0)


def told_by_heads(
    rank: int, size: int, dtype: torch.dtype, chunk: int
) -> dict[str, list[tuple[str, int]]]:
    case = shard_of(head_case(**_DRAWN).to(dtype), rank, size)
    options = {"chunk_tokens": chunk, "tp_group": distributed.group.WORLD}
    given = case.hidden, case.weight, case.token_ids
    objective = case.old_log_probs, case.advantages, case.layout
    said = {}
    with counted() as said["loss"]:
        linear_steppo_loss(*given, *objective, config=_WIDE, **options)
    with counted() as said["log-probs"]:
        log_probs = linear_token_log_probs(*given, mask=case.mask, **options)
    with counted() as said["backward"]:
        log_probs.sum().backward()
    return {name: one.words() for name, one in said.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("size", "chunk"), [(2, 16), (2, 3), (3, 16), (3, 1000)])
def test_sharded_heads(worlds: Worlds, size: int, chunk: int, dtype: torch.dtype) -> None:
    case = head_case(**_DRAWN)
    rows, lengths = case.layout.num_tokens, case.layout.step_lengths.tolist()
    head = account.Head(
        rows, case.hidden.shape[-1], min(chunk, rows), False, live=rows, itemsize=dtype.itemsize
    )
    wanted = {
        "loss": head.loss(evaluations(lengths, chunk)),
        "log-probs": head.log_probs(),
        "backward": head.log_probs_backward(),
    }
    for found in worlds.run(size, told_by_heads, dtype, chunk):
        for name, sent in wanted.items():
            counts = Counter(found[name])
            assert counts == Counter({(one.collective, one.bytes): one.count for one in sent}), name


def told_of_a_batch(rank: int, size: int) -> dict[str, list[tuple[str, int]]]:
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 3] = False
    layout, values = StepLayout.from_mask(mask), torch.ones(2, 6)
    metrics = steppo_loss(values, values, torch.ones(layout.num_steps), layout).metrics
    said = {}
    with counted() as said["batch_reduction"]:
        batch_reduction([layout, layout], "step_mean")
    with counted() as said["ratio_center"]:
        ratio_center(values, values, layout)
    with counted() as said["step_gae"]:
        step_gae(values, values, layout)
    with counted() as said["merge_metrics"]:
        merge_metrics([metrics, metrics])
    return {name: one.words() for name, one in said.items()}


@pytest.mark.parametrize("size", [2, 3])
def test_functions_of_a_batch(worlds: Worlds, size: int) -> None:
    wanted = {
        name: [(one.collective, one.bytes) for one in sent]
        for name, sent in account.OF_A_BATCH.items()
    }
    assert worlds.run(size, told_of_a_batch) == [wanted] * size


def told_of_tokens(
    rank: int, size: int, length: int, dtype: torch.dtype, arrays: int
) -> list[tuple[str, int]]:
    shard = ContextShard.zigzag(length)
    own = torch.zeros(3, len(shard.columns), dtype=dtype, requires_grad=True)
    with counted() as said:
        found = shard.whole(*[own] * arrays)
        sum(one.sum() for one in (found if arrays > 1 else (found,))).backward()
    return said.words()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "length", "arrays"), [(2, 1001, 1), (3, 700, 2), (3, 1, 1)])
def test_tokens_of_all_ranks(
    worlds: Worlds, size: int, length: int, arrays: int, dtype: torch.dtype
) -> None:
    chunk = -(-length // (2 * size))
    most = max(
        sum(max(0, min(chunk, length - chunk * place)) for place in (rank, 2 * size - 1 - rank))
        for rank in range(size)
    )
    sent = account.whole(3 * most, arrays, dtype.itemsize)
    wanted = [(one.collective, one.bytes) for one in sent]
    assert worlds.run(size, told_of_tokens, length, dtype, arrays) == [wanted] * size


def test_tables_of_the_page_are_those_of_the_account() -> None:
    from benchmarks.scaling.__main__ import PAGE, filled
    from benchmarks.scaling.tables import POSITIONS, sized

    page = PAGE.read_text()
    held = sized(account.whole_memory(8, POSITIONS))
    assert f"of 8 ranks and these positions, up to {held}." in page
    assert filled(page) == page, "run python -m benchmarks.scaling --write"


def test_received_bytes() -> None:
    assert account.Sent("all_gather", 3, 10).received(4) == 90
    assert account.Sent("all_reduce", 1, 100).received(4) == 150
    assert account.received([account.Sent("all_reduce", 2, 8)], 1) == 0


def test_efficiency_is_that_of_the_medians() -> None:
    from benchmarks.scaling.weak import summary

    seconds = {"data": {"1": [1.0, 1.0, 9.0], "2": [2.0, 1.25, 0.5]}}
    found = {"seconds": {"1": 1.0, "2": 1.25}, "efficiency": 0.8}
    assert summary(seconds) == {"data": found}
