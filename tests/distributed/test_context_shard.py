"""Tokens of a batch on several ranks: there and back, and every function of the package on it."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from batches import random_batch
from collectives import counted, error_of
from functions_of_steps import TERMS, assert_bitwise
from methods import METHODS
from torch import Tensor
from worlds import Worlds

from steppo_kernels import (
    StepLayout,
    rollout_weights,
    step_gae,
    step_log_ratios,
    step_value_loss,
    steppo_loss,
)
from steppo_kernels.config import REDUCTIONS
from steppo_kernels.distributed import ContextShard

SIZES = (2, 3)
KINDS = ("contiguous", "zigzag", "any", "one has none", "one has all")


def shard_of(kind: str, length: int, rank: int, size: int, **options: Any) -> ContextShard:
    """Return a shard; the last three are random columns, the same draw on all ranks."""
    if kind in ("contiguous", "zigzag"):
        return getattr(ContextShard, kind)(length, **options)
    draw = random.Random(length)
    order = draw.sample(range(length), length)
    cuts = sorted(draw.randint(0, length) for _ in range(size - 1))
    if kind == "one has none":
        cuts[:1] = [0] * len(cuts[:1])
    elif kind == "one has all":
        cuts = [0] * (size - 1)
    begin, end = [0, *cuts][rank], [*cuts, length][rank]
    return ContextShard.of_columns(torch.tensor(order[begin:end], dtype=torch.int32), length)


def columns_of(rank: int, size: int, length: int) -> dict[str, list[int]]:
    return {kind: shard_of(kind, length, rank, size).columns.tolist() for kind in KINDS}


@pytest.mark.parametrize("size", SIZES)
def test_columns_of_the_ranks(worlds: Worlds, size: int) -> None:
    for length in (0, 1, 5, 12, 13, 24):
        every = worlds.run(size, columns_of, length)
        for kind in KINDS:
            found = sorted(place for columns in every for place in columns[kind])
            assert found == list(range(length)), (kind, length)
        if length % (2 * size):
            continue
        chunks = torch.arange(length).chunk(2 * size)
        whole = torch.arange(length).chunk(size)
        for rank, columns in enumerate(every):
            assert columns["contiguous"] == whole[rank].tolist(), length
            expected = torch.cat([chunks[rank], chunks[2 * size - 1 - rank]]).tolist()
            assert columns["zigzag"] == expected, length


def packed_rows(rank: int, size: int) -> list[list[int]]:
    return [
        ContextShard.zigzag(length, cu_seqlens=offsets, dim=0).columns.tolist()
        for length, offsets in PACKED
    ]


PACKED: list[tuple[int, Any]] = [
    (36, [0, 12, 12, 36]),
    (36, torch.tensor([0, 24, 36], dtype=torch.int32)),
    (17, [0, 1, 4, 17]),
    (0, [0]),
]


@pytest.mark.parametrize("size", SIZES)
def test_packed_rows_are_split_one_by_one(worlds: Worlds, size: int) -> None:
    every = worlds.run(size, packed_rows)
    for case, (length, offsets) in enumerate(PACKED):
        found = sorted(place for columns in every for place in columns[case])
        assert found == list(range(length)), offsets
        for rank, columns in enumerate(every):
            if length % 12:
                continue
            expected = []
            for begin, end in pairwise([int(end) for end in offsets]):
                chunks = torch.arange(begin, end).view(2 * size, (end - begin) // (2 * size))
                expected += chunks[[rank, -1 - rank]].flatten().tolist()
            assert columns[case] == expected, (offsets, rank)


# Small ones stand before large ones.
DTYPES = (
    torch.bool,
    torch.int64,
    torch.uint8,
    torch.float64,
    torch.bfloat16,
    torch.float32,
    torch.float16,
    torch.int32,
)


def bits(value: Tensor) -> Tensor:
    return value.reshape(-1).view(torch.uint8)


def there_and_back(rank: int, size: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for kind in KINDS:
        for rows, length in ((3, 13), (1, 40), (2, 1), (0, 7), (2, 0)):
            what = f"{kind}, [{rows}, {length}], {size} ranks"
            shard = shard_of(kind, length, rank, size)
            # Any bits, NaN with a payload among them.
            drawn = [
                torch.randint(
                    0, 256, (rows, length, 3, 8), generator=generator, dtype=torch.uint8
                ).view(dtype)
                if dtype != torch.bool
                else torch.rand((rows, length), generator=generator) < 0.5
                for dtype in DTYPES
            ]
            parts = shard.local(*drawn)
            for part, given in zip(parts, drawn, strict=True):
                assert torch.equal(bits(part), bits(given[:, shard.columns])), what
            with counted() as said:
                wholes = shard.whole(*parts)
            assert said.names == ["all_gather"] * 2, what
            for whole, given in zip(wholes, drawn, strict=True):
                assert whole.dtype == given.dtype
                assert whole.shape == given.shape, what
                assert torch.equal(bits(whole), bits(given)), (what, given.dtype)
            alone = shard.whole(parts[1].movedim(0, 2).contiguous().movedim(2, 0))
            assert torch.equal(bits(alone), bits(drawn[1])), what
    packed = ContextShard.zigzag(11, dim=0)
    for shape in ((11,), (11, 2)):
        given = torch.randn(shape, generator=generator)
        assert torch.equal(packed.whole(packed.local(given)), given), shape
    # Of rows of fp32, that is about 4 bytes a token.
    shard = ContextShard.contiguous(6000)
    with counted() as said:
        shard.whole(shard.local(torch.zeros(2, 6000)))
    assert said.bytes[0] == 168
    assert 4 * 2 * 6000 / size <= said.bytes[1] <= 4 * 2 * 6000 / size + 1024


@pytest.mark.parametrize("size", [1, *SIZES])
def test_there_and_back(worlds: Worlds, size: int) -> None:
    worlds.run(size, there_and_back)


def every_method(rank: int, size: int) -> dict[str, Tensor]:
    """Losses, metrics and gradients of all methods are bitwise those of one process."""
    losses = {}
    for seed, (name, method) in enumerate(METHODS.items()):
        drawn: Any = {"ratio": method.ratio, "log_ratios": (-0.9, 0.9)}
        drawn["dtype"] = (torch.float32, torch.float64)[seed % 2]
        batch = random_batch(seed, 5, 26, **drawn)
        shard = shard_of(KINDS[seed % len(KINDS)], 26, rank, size)
        for reduction in REDUCTIONS:
            what = f"{name}, {reduction}, {shard}"
            bounds = method.surrogate not in ("tv", "soft") and method.ratio != "token"
            clamp = {"token_clip": (0.3, 0.2)} if bounds and seed % 3 == 0 else {}
            config = method.config(reduction=reduction, **TERMS, **clamp)
            leaves = [batch.log_probs.clone(), batch.entropy.clone()]
            own = [leaf.requires_grad_() for leaf in shard.local(*leaves)]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            found = []
            for log_probs, entropy in (leaves, shard.whole(*own)):
                out = steppo_loss(
                    log_probs,
                    batch.old_log_probs,
                    batch.entropy - 1.5 if seed % 2 else batch.advantages,
                    batch.layout,
                    config=config,
                    ref_log_probs=batch.ref_log_probs,
                    entropy=entropy,
                    is_weights=batch.token_weights,
                )
                found.append(out)
            with counted() as said:
                grads = [
                    torch.autograd.grad(out.loss, parts, torch.full_like(out.loss, 0.7))
                    for out, parts in zip(found, (leaves, own), strict=True)
                ]
            assert said.names == [], what
            whole, parted = (
                {"loss": o.loss, "metrics": o.metrics.values, "x": o.step_log_ratio} for o in found
            )
            assert_bitwise(parted, whole)
            for place, (exact, part) in enumerate(zip(*grads, strict=True)):
                assert torch.equal(part, exact[:, shard.columns]), (what, place)
            losses[what.rpartition(", ")[0]] = found[1].loss.detach()
    return losses


@pytest.mark.parametrize("size", SIZES)
def test_every_method_is_bitwise_that_of_one_process(worlds: Worlds, size: int) -> None:
    first, *others = worlds.run(size, every_method)
    assert len(first) == len(METHODS) * len(REDUCTIONS)
    for other in others:
        assert_bitwise(other, first)


def other_functions(rank: int, size: int) -> None:
    for kind in KINDS:
        batch = random_batch(4, 5, 26, log_ratios=(-0.9, 0.9))
        shard = shard_of(kind, 26, rank, size)
        names = ("values", "rewards", "log_probs", "old_log_probs")
        own = [part.requires_grad_() for part in shard.local(*(getattr(batch, n) for n in names))]
        wholes = dict(zip(names, shard.whole(*own), strict=True))
        leaves = {name: getattr(batch, name).clone().requires_grad_() for name in names}
        found = []
        for given in (leaves, wholes):
            gae = step_gae(given["rewards"], given["values"], batch.layout)
            value = step_value_loss(
                given["values"], gae.returns, batch.layout, old_values=batch.old_values
            )
            pair = (given["log_probs"], given["old_log_probs"].detach())
            x = step_log_ratios(*pair, batch.layout, ratio="centered")
            weights = rollout_weights(*pair, batch.layout, level="step", low=0.9, high=1.1)
            found.append((value.loss + x.square().sum(), gae.advantages, weights.weights))
        for exact, part in zip(*found, strict=True):
            assert torch.equal(exact, part), kind
        grads = torch.autograd.grad(found[0][0], [leaves["values"], leaves["log_probs"]])
        parts = torch.autograd.grad(found[1][0], [own[0], own[2]])
        for exact, part in zip(grads, parts, strict=True):
            assert torch.equal(part, exact[:, shard.columns]), kind


@pytest.mark.parametrize("size", SIZES)
def test_advantages_values_ratios_and_weights(worlds: Worlds, size: int) -> None:
    worlds.run(size, other_functions)


LAYOUTS = {
    "a step over all ranks": torch.ones(1, 12),
    "steps of one token": torch.tensor([[1, 0] * 6, [0, 1] * 6]),
    "tokens of the first rank alone": torch.tensor([[1, 1] + [0] * 10]),
    "no action token": torch.zeros(2, 12),
    "no row": torch.zeros(0, 12),
}


def shapes_of_steps(rank: int, size: int) -> None:
    for name, mask in LAYOUTS.items():
        for kind in KINDS:
            shard = shard_of(kind, 12, rank, size)
            layout = StepLayout.from_mask(mask)
            garbage = torch.where(mask > 0, 0.1 * torch.arange(12.0), torch.nan)
            own, leaf = shard.local(garbage).requires_grad_(), garbage.clone().requires_grad_()
            advantages = torch.arange(float(layout.num_steps)) - 0.5
            old = torch.where(mask > 0, 0.5, torch.nan)
            for values, part in ((leaf, leaf), (shard.whole(own), own)):
                loss = steppo_loss(values, old, advantages, layout).loss
                loss.backward()
                assert part.grad.isfinite().all(), (name, kind)
            assert torch.equal(own.grad, leaf.grad[:, shard.columns]), (name, kind)


@pytest.mark.parametrize("size", SIZES)
def test_shapes_of_steps(worlds: Worlds, size: int) -> None:
    worlds.run(size, shapes_of_steps)


def complex_parts(rank: int, size: int) -> None:
    shard = ContextShard.zigzag(5)
    whole = torch.complex(torch.arange(5.0), torch.arange(5.0) + 1).unsqueeze(0)
    own = shard.local(whole.conj()).resolve_conj().requires_grad_()
    found = shard.whole(own)
    assert torch.equal(found, whole.conj())
    weights = torch.complex(torch.ones(5), torch.arange(5.0))
    (grad,) = torch.autograd.grad((weights * found).sum().real, own)
    assert torch.equal(grad, weights.conj()[shard.columns].unsqueeze(0))


def test_complex_numbers(worlds: Worlds) -> None:
    worlds.run(2, complex_parts)


def second_derivative(rank: int, size: int) -> str:
    shard = ContextShard.contiguous(4)
    own = torch.ones(1, len(shard.columns), requires_grad=True)
    loss = shard.whole(own).square().sum()
    (grad,) = torch.autograd.grad(loss, own, create_graph=True)
    return error_of(lambda: torch.autograd.grad(grad.sum(), own))


def test_second_derivatives_raise(worlds: Worlds) -> None:
    """They would need what the other ranks have."""
    for error in worlds.run(2, second_derivative):
        assert error.startswith("RuntimeError: ContextShard.whole: got a second derivative")


def test_shards_are_made_by_constructors() -> None:
    with pytest.raises(TypeError, match=r"^ContextShard: got a call, expected one of its"):
        ContextShard(12)
