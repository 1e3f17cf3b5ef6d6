"""Losses whose tokens lie on several ranks, on every backend and in every dtype.

Errors are bounded by those of plain PyTorch in the dtype, also where the vocabulary is split too.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from batches import Error
from head_cases import HeadCase, head_case, plain_loss
from head_regimes import typed
from heads import bounds
from targets import Target
from torch import Tensor
from worlds import Worlds

from steppo_kernels import StepPOConfig
from steppo_kernels.distributed import ContextShard, context_linear_steppo_loss

# Wide: what a rounding error clips is not what is measured here.
CONFIG = StepPOConfig(clip_low=0.9, clip_high=9.0, entropy_coef=0.01)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def drawn(seed: int, dtype: torch.dtype, interpreted: bool) -> HeadCase:
    """Return a case whose hidden states and weight are of the dtype, and exact in it."""
    shape = {"rows": 1, "length": 17} if interpreted else {"rows": 3, "length": 26}
    case = head_case(seed, size=16, vocabulary=25, moved=0.02, **shape)
    return typed(case, dtype, "cpu")


def on_a_backend(
    rank: int, size: int, backend: str, dtype: torch.dtype, seeds: range, shares: int
) -> list[dict[str, Tensor]]:
    """Return loss and gradients; each `shares` ranks have the same tokens, and ids of their own."""
    names = ("tokens", "ids")
    mesh = torch.distributed.init_device_mesh("cpu", (size // shares, shares), mesh_dim_names=names)
    place, found = mesh["ids"].get_local_rank(), []
    for seed in seeds:
        case = drawn(seed, dtype, backend == "triton")
        shard = ContextShard.zigzag(case.mask.shape[1], group=mesh["tokens"])
        ends = bounds(len(case.weight), shares)
        hidden = shard.local(case.hidden.detach()).requires_grad_()
        weight = case.weight.detach()[ends[place] : ends[place + 1]].clone().requires_grad_()
        options: dict[str, Any] = {} if shares == 1 else {"tp_group": mesh["ids"]}
        out = context_linear_steppo_loss(
            hidden,
            weight,
            shard.local(case.token_ids),
            case.old_log_probs,
            case.advantages,
            case.layout,
            shard,
            config=CONFIG,
            chunk_tokens=(None, 6)[seed % 2],
            backend=backend,
            **options,
        )
        grads = torch.autograd.grad(out.loss, [hidden, weight])
        assert all(grad.dtype == dtype for grad in grads)
        found.append({"loss": out.loss.detach(), "hidden": grads[0], "weight": grads[1]})
        found[-1]["columns"] = shard.columns
    return found


def put_together(
    answers: list[dict[str, Tensor]], like: HeadCase, shares: int
) -> dict[str, Tensor]:
    """Return what all ranks found; gradients of the weight are added up in fp64."""
    for other in answers[1:]:
        assert torch.equal(other["loss"], answers[0]["loss"])
    hidden = torch.zeros_like(like.hidden)
    for place, one in enumerate(answers):
        own = answers[place - place % shares]["hidden"]
        assert torch.equal(one["hidden"], own), "ranks with the same tokens differ"
        hidden[:, one["columns"]] = own
    parts = [sum(one["weight"].double() for one in answers[ids::shares]) for ids in range(shares)]
    return {"loss": answers[0]["loss"], "hidden": hidden, "weight": torch.cat(parts)}


def plain(seed: int, dtype: torch.dtype, interpreted: bool) -> dict[str, Tensor]:
    case = drawn(seed, dtype, interpreted)
    loss = plain_loss(case, {}, config=CONFIG).loss
    hidden, weight = torch.autograd.grad(loss, [case.hidden, case.weight])
    return {"loss": loss.detach(), "hidden": hidden, "weight": weight}


def check(worlds: Worlds, target: Target, size: int, dtype: torch.dtype, shares: int) -> None:
    if target.interpreted and dtype == torch.bfloat16:
        pytest.skip("the interpreter of Triton drops bits of bf16")
    seeds = range(2 if target.interpreted else 8)
    squares: dict[tuple[str, str], list[float]] = {}
    every = worlds.run(size, on_a_backend, target.backend, dtype, seeds, shares)
    for seed, *answers in zip(seeds, *every, strict=True):
        found = put_together(answers, drawn(seed, dtype, target.interpreted), shares)
        exact = plain(seed, torch.float64, target.interpreted)
        for who, got in (("ranks", found), ("plain", plain(seed, dtype, target.interpreted))):
            for name, value in exact.items():
                error = Error.between(got[name].nan_to_num(), value.nan_to_num()).rms
                squares.setdefault((who, name), []).append(error**2)
    factor = 1.0 if dtype.itemsize == 2 else 2.0
    # In fp64, plain PyTorch is taken for exact. A loss is one number, in which terms of both signs
    # meet: chance has a say.
    rounding = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for name in exact:
        error, allowed = (
            math.sqrt(sum(squares[who, name]) / len(seeds)) for who in ("ranks", "plain")
        )
        assert error <= factor * allowed + rounding, (name, error, allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_tokens(target: Target, worlds: Worlds, size: int, dtype: torch.dtype) -> None:
    check(worlds, target, size, dtype, shares=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_and_vocabulary(target: Target, worlds: Worlds, dtype: torch.dtype) -> None:
    check(worlds, target, 4, dtype, shares=2)
