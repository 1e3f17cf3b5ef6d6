"""Any split of a batch over ranks and micro-batches gives what one call on the whole gives."""

from __future__ import annotations

import hashlib
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from batches import random_batch
from collectives import counted, parted
from functions_of_steps import TERMS, close, rows_of
from methods import METHODS
from torch import Tensor
from worlds import Worlds

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    rollout_weights,
    step_value_loss,
    steppo_loss,
)
from steppo_kernels.config import REDUCTIONS
from steppo_kernels.distributed import batch_reduction, merge_metrics, ratio_center

SIZES = (2, 3)


def policy_loss(batch: Any, config: StepPOConfig, **options: Any) -> Any:
    """Return the output for a batch, and the gradients of log-probs and entropies."""
    leaves = [batch.log_probs.clone().requires_grad_(), batch.entropy.clone().requires_grad_()]
    out = steppo_loss(
        leaves[0],
        batch.old_log_probs,
        batch.advantages,
        batch.layout,
        config=config,
        ref_log_probs=batch.ref_log_probs,
        entropy=leaves[1],
        is_weights=batch.token_weights,
        **options,
    )
    return out, torch.autograd.grad(out.loss, leaves)


def close_metrics(found: Any, expected: Any, what: str) -> None:
    found, expected = found.as_dict(), expected.as_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-11), f"{what}: {name}"


def methods_over_ranks(rank: int, size: int) -> list[tuple[str, Tensor, Tensor]]:
    """Return the loss of this rank and the whole one of each case; the rest is checked here."""
    results = []
    for seed, (name, method) in enumerate(METHODS.items()):
        # A row has no action token.
        mask = random_batch(seed, 7, 24).mask
        mask[3] = False
        drawn: Any = {"ratio": method.ratio, "log_ratios": (-0.9, 0.9), "dtype": torch.float64}
        batch = random_batch(seed, mask=mask, **drawn)
        for reduction in REDUCTIONS:
            what = f"{name}, {reduction}, {size} ranks"
            gradients = "mean" if (seed + len(reduction)) % 2 else "sum"
            shares = size if gradients == "mean" else 1
            config = method.config(reduction=reduction, **TERMS)
            expected, grads = policy_loss(batch, config)
            own = [rows_of(batch, rows) for rows in parted(7, size, seed)[rank]]
            layouts = [part.layout for part in own]
            weights, normalizer = batch_reduction(layouts, reduction, gradients=gradients)
            center = None
            if method.ratio == "centered":
                new, old = ([getattr(p, n) for p in own] for n in ("log_probs", "old_log_probs"))
                center = ratio_center(new, old, layouts)
            loss, metrics = torch.zeros((), dtype=torch.float64), []
            for rows, part, weight in zip(parted(7, size, seed)[rank], own, weights, strict=True):
                out, part_grads = policy_loss(
                    part,
                    config,
                    step_weights=weight,
                    normalizer=normalizer,
                    ratio_center=center,
                )
                loss += out.loss.detach()
                metrics.append(out.metrics)
                for found, exact in zip(part_grads, grads, strict=True):
                    close(found / shares, exact[rows], what)
            close_metrics(merge_metrics(metrics, gradients=gradients), expected.metrics, what)
            results.append((what, loss / shares, expected.loss.detach()))
    return results


@pytest.mark.parametrize("size", SIZES)
def test_every_method_over_ranks_and_micro_batches(worlds: Worlds, size: int) -> None:
    every = worlds.run(size, methods_over_ranks)
    assert len(every[0]) == len(METHODS) * len(REDUCTIONS)
    for cases in zip(*every, strict=True):
        what, _, expected = cases[0]
        close(sum(loss for _, loss, _ in cases), expected, what)


OWNERS = [5, 7, 5, 5, 7, 9, 5, 7, 9, 11]
TURNS = [0, 1, 2, 1, 0, 0, 3, 2, 1, 0]
VALID = torch.tensor([True] * 8 + [False] + [True])


def split_trajectories(rank: int, size: int, kind: str) -> list[tuple[str, Tensor, Tensor]]:
    """One row a step, shuffled over ranks and micro-batches; some rows are empty or padding."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand((10, 12), generator=generator) < 0.5
    # Trajectory 11 has no action token; another one has a step without any.
    mask[4] = mask[9] = False
    log_probs, old = 0.1 * torch.randn((2, 10, 12), generator=generator, dtype=torch.float64)
    advantages = torch.randn(10, generator=generator, dtype=torch.float64)
    names = {"int": int, "str": "trajectory {}".format, "huge": lambda owner: owner + 2**70}
    owners = [names[kind](owner) for owner in OWNERS]

    def part(rows: list[int], **options: Any) -> Any:
        layout = StepLayout.from_rows(
            mask[rows], [owners[r] for r in rows], [TURNS[r] for r in rows], valid=VALID[rows]
        )
        ids = list(dict.fromkeys(owners[r] for r in rows if VALID[r]))

        def run(**options: Any) -> tuple[Tensor, Tensor]:
            leaf = log_probs[rows].requires_grad_()
            loss = steppo_loss(leaf, old[rows], advantages[rows], layout, **options).loss
            return loss.detach(), torch.autograd.grad(loss, leaf)[0]

        return layout, ids, run

    results = []
    for reduction in REDUCTIONS:
        for seed in range(8):
            what = f"{reduction}, ids of kind {kind}, split {seed} over {size} ranks"
            config = StepPOConfig(clip_low=0.1, clip_high=0.1, reduction=reduction)
            whole, _, run = part(list(range(10)))
            loss, grad = run(config=config)
            split = parted(10, size, seed)[rank]
            own = [part(rows) for rows in split]
            ids: Any = [one for _, one, _ in own]
            # One layout may come by itself.
            layouts: Any = [layout for layout, _, _ in own]
            if len(own) == 1:
                layouts = layouts[0]
                ids = ids[0] if kind != "int" else torch.tensor(ids[0], dtype=torch.int64)
            gathers = 2 if reduction == "trajectory_mean" else 1
            with counted() as said:
                weights, normalizer = batch_reduction(layouts, reduction, trajectory_ids=ids)
            assert said.names == ["all_gather"] * gathers, what
            exact_weights, exact = whole.reduction_weights(reduction)
            assert normalizer == exact / size, what
            total = torch.zeros((), dtype=torch.float64)
            for rows, weight, (_, _, of_part) in zip(split, weights, own, strict=True):
                assert torch.equal(weight, exact_weights[rows]), what
                found = of_part(config=config, step_weights=weight, normalizer=normalizer)
                total += found[0]
                close(found[1] / size, grad[rows], what)
            results.append((what, total / size, loss))
    return results


@pytest.mark.parametrize("kind", ["int", "str", "huge"])
@pytest.mark.parametrize("size", SIZES)
def test_trajectories_that_are_split_over_ranks(worlds: Worlds, size: int, kind: str) -> None:
    for cases in zip(*worlds.run(size, split_trajectories, kind), strict=True):
        what, _, expected = cases[0]
        close(sum(loss for _, loss, _ in cases), expected, what)


def without_actions(rank: int, size: int) -> None:
    masked = StepLayout.from_mask(torch.zeros(2, 5, dtype=torch.bool))
    for reduction in REDUCTIONS:
        for ids in (None, [[3, 4]]):
            own, own_ids = ([masked], ids) if rank == 0 else ([], None if ids is None else [])
            weights, normalizer = batch_reduction(own, reduction, trajectory_ids=own_ids)
            assert normalizer == (1 / size if reduction == "sum" else 0), reduction
            for weight in weights:
                leaf = torch.zeros(2, 5, requires_grad=True)
                options = {"step_weights": weight, "normalizer": normalizer}
                loss = steppo_loss(leaf, None, torch.zeros(0), masked, **options).loss
                loss.backward()
                assert loss == 0
                assert not leaf.grad.any()
    none = torch.full((2, 5), torch.nan)
    assert ratio_center(none, none, masked) == 0
    assert ratio_center([], [], []) == 0


@pytest.mark.parametrize("size", SIZES)
def test_batch_without_action_tokens(worlds: Worlds, size: int) -> None:
    worlds.run(size, without_actions)


def other_metrics(rank: int, size: int) -> list[tuple[str, list[float]]]:
    """Metrics of value losses and of rollout weights, over some splits."""
    batch = random_batch(8, 7, 24, log_ratios=(-1.0, 1.0), dtype=torch.float64)

    def value(part: Any, **options: Any) -> Any:
        return step_value_loss(
            part.values, part.returns, part.layout, old_values=part.old_values, **options
        ).metrics

    def rollout(part: Any, level: str) -> Any:
        bounds = {"low": 0.8, "high": 1.2}
        return rollout_weights(
            part.log_probs, part.old_log_probs, part.layout, level=level, **bounds
        ).metrics

    found = []
    for seed in range(6):
        own = [rows_of(batch, rows) for rows in parted(7, size, seed)[rank]]
        _, normalizer = batch_reduction([part.layout for part in own], "step_mean")
        given = {
            "value": ([value(p, normalizer=normalizer) for p in own], value(batch)),
            "value, own denominators": ([value(p) for p in own], value(batch)),
            **{
                level: ([rollout(p, level) for p in own], rollout(batch, level))
                for level in ("token", "step", "trajectory")
            },
        }
        for name, (parts, whole) in given.items():
            what = f"{name}, split {seed} over {size} ranks"
            with counted() as said:
                merged = merge_metrics(parts[0] if len(parts) == 1 else parts)
            assert (said.names, said.bytes) == (["all_gather"], [168]), what
            close_metrics(merged, whole, what)
            found.append((what, merged.values.tolist()))
        # What was merged can be merged again.
        again = merge_metrics(merge_metrics(given["value"][0]), gradients="sum")
        assert again["num_steps"] == size * whole_steps(batch)
    return found


def whole_steps(batch: Any) -> int:
    return int((batch.layout.step_lengths > 0).sum())


@pytest.mark.parametrize("size", SIZES)
def test_metrics_of_value_losses_and_rollout_weights(worlds: Worlds, size: int) -> None:
    first, *others = worlds.run(size, other_metrics)
    for other in others:
        assert other == first


def exact_ids(rank: int, size: int) -> float:
    """Return the normalizer of four trajectories, of which each rank has a step."""
    ids = [2**63 - 1, -(2**63), 2**53, 2**53 + 1]
    layout = StepLayout.from_mask(torch.ones(4, 2))
    unused = AssertionError("an integer of 64 bits is told apart by a hash")
    with mock.patch.object(hashlib, "blake2b", side_effect=unused):
        weights, normalizer = batch_reduction(layout, "trajectory_mean", trajectory_ids=ids)
        for given in ([ids], [torch.tensor(ids)], [np.array(ids)], torch.tensor(ids)):
            again = batch_reduction(layout, "trajectory_mean", trajectory_ids=given)
            assert torch.equal(again[0][0], weights[0])
            assert again[1] == normalizer
    assert weights[0].tolist() == [1 / size] * 4
    return float(normalizer)


@pytest.mark.parametrize("size", SIZES)
def test_integers_of_64_bits_are_ids_as_they_are(worlds: Worlds, size: int) -> None:
    assert worlds.run(size, exact_ids) == [4 / size] * size


def numbers_of_one_gather(rank: int, size: int) -> None:
    """Without ids, whatever the reduction."""
    batch = random_batch(1, 3, 12)
    for reduction in REDUCTIONS:
        with counted() as said:
            batch_reduction(batch.layout, reduction)
        assert (said.names, said.bytes) == (["all_gather"], [168]), reduction
    ids = list(range(rank + 1))
    layout = StepLayout.from_mask(torch.ones(rank + 1, 2))
    with counted() as said:
        batch_reduction(layout, "trajectory_mean", trajectory_ids=ids)
    # A row of its own says that nothing failed.
    assert (said.names, said.bytes) == (["all_gather"] * 2, [168, 24 * (size + 1)])


@pytest.mark.parametrize("size", SIZES)
def test_number_and_size_of_the_gathers(worlds: Worlds, size: int) -> None:
    worlds.run(size, numbers_of_one_gather)
