"""Wrong or different arguments of some ranks raise on all of them, and the next call works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from calls import (
    LAYOUT,
    MASK,
    STEPS,
    ZEROS,
    center,
    columns,
    contiguous,
    gae,
    head,
    metrics,
    reduction,
    whole,
    zigzag,
)
from collectives import error_of
from worlds import Worlds

from steppo_kernels import StepLayout, StepPOConfig
from steppo_kernels.distributed import ContextShard

# A function, what one rank gives it in place of what is right, and what that rank and the others
# must hear: the same, if None.
CASES: dict[str, tuple[Callable[[dict[str, Any]], Any], dict[str, Any], str, str | None]] = {
    "no such reduction": (
        reduction,
        {"reduction": "mean"},
        "ValueError: reduction: got 'mean', expected one of",
        "RuntimeError: batch_reduction: rank {} of group raised ValueError: reduction: got 'mean'",
    ),
    "another reduction": (
        reduction,
        {"reduction": "step_mean"},
        "ValueError: group: its ranks got different arguments, expected the same: reduction is",
        None,
    ),
    "ids": (
        reduction,
        {"trajectory_ids": [3]},
        "trajectory_ids is",
        None,
    ),
    "too many ids": (
        reduction,
        {"trajectory_ids": [3, 4]},
        "ValueError: trajectory_ids[0]: got 2 entries, expected 1, one per trajectory",
        "RuntimeError: batch_reduction: rank {} of group raised ValueError: trajectory_ids[0]",
    ),
    "no layout": (
        reduction,
        {"layouts": [ZEROS]},
        "TypeError: layouts: got Tensor, expected StepLayout or a list of it",
        "raised TypeError: layouts: got Tensor",
    ),
    "other gradients": (reduction, {"gradients": "sum"}, "gradients is", None),
    "no gradients": (
        reduction,
        {"gradients": "avg"},
        "ValueError: gradients: got 'avg', expected one of 'mean', 'sum'",
        "raised ValueError: gradients: got 'avg'",
    ),
    "lists of two lengths": (
        center,
        {"log_probs": [ZEROS, ZEROS]},
        "ValueError: log_probs: got 2, expected 1, one per layout",
        "raised ValueError: log_probs: got 2",
    ),
    "clamped or not": (
        center,
        {"config": StepPOConfig(ratio="centered", token_clip=(0.1, 0.2)), "advantages": STEPS},
        "config.token_clip is ",
        None,
    ),
    "clamped without advantages": (
        center,
        {"config": StepPOConfig(ratio="centered", token_clip=(0.1, 0.2))},
        "ValueError: advantages: got None, expected a tensor or a list of it, as config.token_clip",
        "raised ValueError: advantages: got None",
    ),
    "no config": (
        center,
        {"config": {"token_clip": (0.1, 0.2)}},
        "TypeError: config: got dict, expected a StepPOConfig",
        "raised TypeError: config: got dict",
    ),
    "advantages of other steps": (
        center,
        {"advantages": STEPS[:1]},
        "ValueError: advantages: got shape (1,), expected one entry per step (2,)",
        "raised ValueError: advantages: got shape (1,)",
    ),
    "advantages of more layouts": (
        center,
        {"advantages": [STEPS, STEPS]},
        "ValueError: advantages: got 2, expected 1, one per layout",
        "raised ValueError: advantages: got 2",
    ),
    "a shape": (
        center,
        {"old_log_probs": torch.zeros(1, 5)},
        "ValueError: old_log_probs: got shape (1, 5)",
        "raised ValueError: old_log_probs: got shape (1, 5)",
    ),
    "gamma out of range": (
        gae,
        {"gamma": 1.5},
        "ValueError: gamma: got 1.5",
        "raised ValueError: gamma: got 1.5",
    ),
    "another gamma": (gae, {"gamma": 0.5}, "gamma is", None),
    "whitened or not": (gae, {"whiten": False}, "whiten is", None),
    "another dtype": (gae, {"values": STEPS.double()}, "dtype is torch.float", None),
    "no metrics": (
        metrics,
        {"kind": "number"},
        "TypeError: metrics: got int, expected Metrics or a list of it",
        "raised TypeError: metrics: got int",
    ),
    "another kind of metrics": (
        metrics,
        {"kind": "value"},
        "ValueError: metrics: got metrics of a",
        None,
    ),
    "metrics that add up": (
        metrics,
        {"kind": "adds up"},
        "with denominators of their own on rank",
        None,
    ),
    "another length": (contiguous, {"length": 7}, "length is", None),
    "no length": (
        contiguous,
        {"length": -1},
        "ValueError: length: got -1, expected at least 0",
        "raised ValueError: length: got -1",
    ),
    "no dimension": (
        contiguous,
        {"dim": 2},
        "ValueError: dim: got 2, expected 0 or 1",
        "raised ValueError: dim: got 2",
    ),
    "rows that end too early": (
        zigzag,
        {"cu_seqlens": [0, 2, 5]},
        "ValueError: cu_seqlens: got offsets from 0 to 5, expected offsets from 0 to 6",
        "raised ValueError: cu_seqlens: got offsets from 0 to 5",
    ),
    "other rows of a pack": (zigzag, {"cu_seqlens": [0, 2, 6]}, "order of columns is", None),
    "a column twice": (
        columns,
        {"columns": [0, 1, 2, 2]},
        "ValueError: columns: got place",
        None,
    ),
    "a column on no rank": (
        columns,
        {"columns": []},
        " on no rank, expected each place on one rank",
        None,
    ),
    "a column too far": (
        columns,
        {"columns": [6]},
        "ValueError: columns: got 6, expected places of a length of 6",
        "raised ValueError: columns: got 6",
    ),
    "columns that are none": (
        columns,
        {"columns": [0.5]},
        "TypeError: columns: got",
        "raised TypeError: columns: got",
    ),
    "tokens too many": (
        whole,
        {"more": 1},
        "ValueError: parts[0]: got shape (1, ",
        "raised ValueError: parts[0]: got shape (1, ",
    ),
    "other rows": (whole, {"rows": 2}, "parts[0] is (torch.float32, ", None),
    "other dtypes": (whole, {"dtypes": [torch.float64]}, "parts[0] is (torch.float", None),
    "a conjugate view": (
        whole,
        {"dtypes": [torch.complex64]},
        "ValueError: parts[0]: got the conjugate view of a complex tensor, expected one whose",
        "raised ValueError: parts[0]: got the conjugate view",
    ),
    "more tensors": (whole, {"dtypes": [torch.float32] * 2}, "parts[1] is ", None),
    "another head": (head, {"weight": torch.zeros(5, 3)}, "weight is (torch.float32, (", None),
    "a head that is none": (
        head,
        {"weight": [0.0]},
        "TypeError: weight: got list, expected a torch.Tensor",
        "raised TypeError: weight: got list",
    ),
    "another hidden size": (head, {"size": [2]}, "hidden is (torch.float32, torch.float32, ", None),
    "another dtype of hidden states": (
        head,
        {"dtype": torch.bfloat16},
        "hidden is (torch.float32, torch.",
        None,
    ),
    "another config": (
        head,
        {"config": StepPOConfig(clip_low=0.5)},
        "expected the same: config.clip_low is ",
        None,
    ),
    "another normalizer": (head, {"normalizer": 3.0}, "normalizer is ", None),
    "another center": (head, {"ratio_center": 3.0}, "ratio_center is ", None),
    "another softcap": (head, {"softcap": 3.0}, "softcap is ", None),
    "another temperature": (head, {"temperature": 3.0}, "temperature is ", None),
    "on-policy or not": (head, {"old_log_probs": None}, "old_log_probs is ", None),
    "entropies or none": (head, {"report_entropy": True}, "report_entropy is ", None),
    "other advantages": (head, {"advantages": ZEROS}, "advantages is", None),
    "another layout": (
        head,
        {"layout": LAYOUT.per_trajectory(), "advantages": STEPS[:1]},
        "layout is ((1, 6), ",
        None,
    ),
    "a layout of another length": (
        head,
        {"layout": StepLayout.from_mask(torch.cat((MASK, MASK[:, :1]), 1)), "old_log_probs": None},
        "ValueError: layout: got the token shape [1, 7], expected [B, 6] of the shard",
        "raised ValueError: layout: got the token shape [1, 7]",
    ),
    "hidden states of other tokens": (
        head,
        {"hidden": torch.ones(1, 6, 3)},
        "ValueError: hidden: got shape (1, 6, 3)",
        "raised ValueError: hidden: got shape (1, 6, 3)",
    ),
    "an error in the head": (
        head,
        {"chunk_tokens": 0},
        "ValueError: chunk_tokens: got 0",
        "RuntimeError: context_linear_steppo_loss: rank {} of group raised an error in it",
    ),
}


def fail(rank: int, size: int, guilty: int) -> dict[str, str]:
    heard = {}
    for name, (function, wrong, *_) in CASES.items():
        heard[name] = error_of(lambda: function(wrong if rank == guilty else {}))  # noqa: B023
        # The ranks still understand each other.
        function({})
    heard["none"] = error_of(lambda: metrics({"kind": "none"}))
    return heard


@pytest.mark.parametrize(("size", "guilty"), [(2, 0), (2, 1), (3, 1)])
def test_all_ranks_raise_and_go_on(worlds: Worlds, size: int, guilty: int) -> None:
    heard = worlds.run(size, fail, guilty)
    for name, (_, _, own, others) in CASES.items():
        for rank, errors in enumerate(heard):
            wanted = own if rank == guilty or others is None else others.format(guilty)
            assert wanted in errors[name], f"{name}, on rank {rank}: {errors[name]!r}"
    for errors in heard:
        assert errors["none"].startswith("ValueError: metrics: got none on any rank of group")


# What means the same is no difference.
ALIKE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({name: 3}, {name: np.float64(3.0)})
    for name in ("normalizer", "ratio_center", "softcap", "temperature")
]
ALIKE += [
    ({"ratio_center": 0.0}, {"ratio_center": -0.0}),
    (
        {"config": StepPOConfig(clip_high=1, token_clip=(1, 2))},
        {"config": StepPOConfig(clip_high=1.0, token_clip=(1.0, 2.0))},
    ),
]


def say_the_same(rank: int, size: int) -> list[list[float]]:
    return [[float(head(pair[0 if rank else 1]).loss), float(head(pair[0]).loss)] for pair in ALIKE]


def test_numbers_are_compared_by_value(worlds: Worlds) -> None:
    first, second = worlds.run(2, say_the_same)
    assert first == second
    assert all(mixed == plain for mixed, plain in first)


def elsewhere(rank: int, size: int) -> str:
    shard = ContextShard.contiguous(6)
    part = torch.zeros(1, len(shard.columns))
    if rank == 0:
        return error_of(lambda: shard.whole(part))

    def moved(self: ContextShard, parts: Any, length: int) -> list[torch.Tensor]:
        return [one.to("meta") for one in parts]

    with mock.patch.object(ContextShard, "_checked", moved):
        return error_of(lambda: shard.whole(part))


def test_devices_of_two_kinds(worlds: Worlds) -> None:
    for error in worlds.run(2, elsewhere):
        assert error.startswith("ValueError: group: its ranks got different arguments"), error
        assert "'cpu') on rank 0, (torch.float32, 1, 'T', 'meta') on rank 1" in error


def other_shards(rank: int, size: int) -> list[str]:
    def made() -> list[ContextShard]:
        return [ContextShard.contiguous(8), ContextShard.zigzag(8)]

    part = torch.zeros(1, 4)
    first = error_of(lambda: whole({"kind": "zigzag"} if rank else {}))
    second = error_of(lambda: made()[rank].whole(part))
    # Where all use the same one, either works.
    for shard in made():
        shard.whole(part)
    return [first, second]


def test_shards_of_two_kinds(worlds: Worlds) -> None:
    """Their lengths are the same, and so are the numbers of tokens of the ranks."""
    for made, used in worlds.run(2, other_shards):
        assert "ContextShard.contiguous on rank 0, ContextShard.zigzag on rank 1" in made
        assert used.startswith("ValueError: group: its ranks got different arguments")
        assert "order of columns is" in used
