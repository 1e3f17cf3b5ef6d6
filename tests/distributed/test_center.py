"""The center of the centered ratio over ranks: of log-ratios as the loss sees them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from batches import random_batch
from collectives import counted, parted
from functions_of_steps import close, rows_of
from torch import Tensor
from worlds import Worlds

from steppo_kernels import StepPOConfig, steppo_loss
from steppo_kernels.config import REDUCTIONS
from steppo_kernels.distributed import batch_reduction, merge_metrics, ratio_center

SIZES = (2, 3)
CLAMPED = StepPOConfig(ratio="centered", token_clip=(0.3, 0.2))


def log_ratios(batch: Any, advantages: Tensor, config: StepPOConfig) -> list[float]:
    """Return the log-ratios of all action tokens, token by token."""
    found = []
    low, high = config.token_clip or (float("inf"), float("inf"))
    for row, column in batch.mask.nonzero().tolist():
        z = float(batch.log_probs[row, column] - batch.old_log_probs[row, column])
        if advantages.dim() == 1:
            advantage = float(advantages[batch.layout.step_ids[row, column]])
        else:
            advantage = float(advantages[row, column])
        found.append(min(z, high) if advantage >= 0 else max(z, -low))
    return found


def centers(rank: int, size: int) -> list[float]:
    found = []
    for seed in range(8):
        dtype = (torch.float32, torch.float64)[seed % 2]
        batch = random_batch(seed, 7, 24, log_ratios=(-0.9, 0.9), dtype=dtype)
        own = [rows_of(batch, rows) for rows in parted(7, size, seed)[rank]]
        layouts = [part.layout for part in own]
        names = ("log_probs", "old_log_probs", "entropy")
        new, old, per_token = ([getattr(part, name) for part in own] for name in names)
        # Of both signs and 0, by token; masked ones are NaN.
        per_token = [(part - 1.5).where(part > 0.5, 0.0) for part in per_token]
        every = (batch.entropy - 1.5).where(batch.entropy > 0.5, 0.0)
        steps = [part.advantages for part in own]
        for config, given, wanted in (
            (StepPOConfig(ratio="centered"), None, batch.advantages),
            (StepPOConfig(ratio="centered"), steps, batch.advantages),
            (CLAMPED, steps, batch.advantages),
            (CLAMPED, per_token, every),
        ):
            with counted() as said:
                center = ratio_center(new, old, layouts, config=config, advantages=given)
            assert (said.names, said.bytes) == (["all_gather"], [168])
            exact = log_ratios(batch, wanted, config)
            limit = {"rel": 1e-13, "abs": 1e-13}
            if config.token_clip is not None and dtype == torch.float32:
                # Bounds are rounded to the dtype of the loss.
                limit = {"abs": 1e-8}
            assert float(center) == pytest.approx(sum(exact) / len(exact), **limit), (seed, config)
            found.append(float(center))
    return found


@pytest.mark.parametrize("size", SIZES)
def test_center_of_all_ranks(worlds: Worlds, size: int) -> None:
    first, *others = worlds.run(size, centers)
    assert others == [first] * (size - 1)


def one_layout(rank: int, size: int) -> None:
    """Tensors by themselves, and a rank without any."""
    batch = random_batch(3, 4, 20, log_ratios=(-0.9, 0.9), dtype=torch.float64)
    exact = log_ratios(batch, batch.advantages, CLAMPED)
    given: Any = (batch.log_probs, batch.old_log_probs, batch.layout)
    advantages: Any = batch.advantages
    if rank:
        given, advantages = ([], [], []), []
    center = ratio_center(*given, config=CLAMPED, advantages=advantages)
    assert float(center) == pytest.approx(sum(exact) / len(exact), rel=1e-13)


def test_one_layout(worlds: Worlds) -> None:
    worlds.run(2, one_layout)


def clamped_losses(rank: int, size: int) -> list[tuple[Any, ...]]:
    """Draw batches, configs and splits; gradients and metrics are checked here."""
    results = []
    for seed in range(60):
        draw = random.Random(seed)
        rows, length = draw.randint(1, 6), draw.randint(1, 9)
        drawn: Any = {"log_ratios": (-0.9, 0.9), "mean_step": 3.0, "dtype": torch.float64}
        batch = random_batch(seed, rows, length, ratio="centered", **drawn)
        reduction = draw.choice(REDUCTIONS)
        config = StepPOConfig(
            ratio="centered",
            token_clip=(draw.choice((0.0, 0.05, 0.3)), draw.choice((0.0, 0.05, 0.3))),
            clip_low=0.2,
            clip_high=0.3,
            reduction=reduction,
        )
        by_token = draw.random() < 0.5
        split = parted(rows, size, seed)[rank]
        own = [rows_of(batch, part) for part in split]
        layouts = [part.layout for part in own]
        new, old = ([getattr(p, n) for p in own] for n in ("log_probs", "old_log_probs"))
        advantages = [part.entropy - 1.5 if by_token else part.advantages for part in own]
        weights, normalizer = batch_reduction(layouts, reduction, gradients="sum")
        center = ratio_center(new, old, layouts, config=config, advantages=advantages)

        def loss(part: Any, given: Tensor, config: StepPOConfig = config, **more: Any) -> Any:
            leaf = part.log_probs.clone().requires_grad_()
            out = steppo_loss(leaf, part.old_log_probs, given, part.layout, config=config, **more)
            return out, torch.autograd.grad(out.loss, leaf)[0]

        every = batch.entropy - 1.5 if by_token else batch.advantages
        exact, whole_grad = loss(batch, every, backend="reference")
        total, found = torch.zeros((), dtype=torch.float64), []
        what = f"seed {seed}, {config}"
        for place, rows_of_part, part in zip(range(len(own)), split, own, strict=True):
            options = {"step_weights": weights[place], "normalizer": normalizer}
            out, grad = loss(part, advantages[place], ratio_center=center, **options)
            close(grad, whole_grad[rows_of_part], what)
            total += out.loss.detach()
            found.append(out.metrics)
        merged = merge_metrics(found, gradients="sum").as_dict()
        for name, value in exact.metrics.as_dict().items():
            assert merged[name] == pytest.approx(value, rel=1e-9, abs=1e-11), f"{what}: {name}"
        results.append((what, total, exact.loss.detach()))
    return results


@pytest.mark.parametrize("size", SIZES)
def test_losses_with_clamped_tokens_over_ranks_and_micro_batches(worlds: Worlds, size: int) -> None:
    for cases in zip(*worlds.run(size, clamped_losses), strict=True):
        what, _, expected = cases[0]
        close(sum(loss for _, loss, _ in cases), expected, what)
