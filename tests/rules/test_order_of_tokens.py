"""A step's tokens ascend within a row only: a step of several rows may hold these in any order."""

from __future__ import annotations

import dataclasses
import itertools

import oracles
import pytest
import torch
from oracle import OracleLayout

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    broadcast_to_tokens,
    step_gae,
    step_value_loss,
    steppo_loss,
)
from steppo_kernels.outputs import POLICY_METRICS

_CONFIG = StepPOConfig(clip_low=0.4, clip_high=0.4, reduction="token_mean", kl_coef=0.1)


def shuffled(mask, names, order, device):
    """One step a trajectory of rows that lie in any order; the oracle's layout of the same."""
    layout = StepLayout.from_rows(mask.to(device), names, order).per_trajectory()
    loops = OracleLayout.from_rows(mask.reshape(-1).tolist(), tuple(mask.shape), names, order)
    return layout, loops.per_trajectory()


def numbers(shape, seed, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) / 4).to(device, dtype)


def check(layout, steps, target, dtype=torch.float64):
    """Compare loss, log-ratios and gradients with loops, twice: a layout is used more than once."""
    device = target.device
    log_probs, old, ref, bonus = (numbers(layout.shape, k, device, dtype) for k in range(4))
    advantages = numbers(layout.num_steps, 9, device, dtype)
    config = dataclasses.replace(_CONFIG, entropy_coef=0.1)
    wanted, _ = oracles.policy_loss(
        steps,
        config,
        log_probs=log_probs,
        old_log_probs=old,
        advantages=broadcast_to_tokens(advantages, layout, backend="reference"),
        ref_log_probs=ref,
        entropy=bonus,
    )
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    for _ in range(2):
        x, h = log_probs.clone().requires_grad_(), bonus.clone().requires_grad_()
        out = steppo_loss(
            x,
            old,
            advantages,
            layout,
            config=config,
            ref_log_probs=ref,
            entropy=h,
            backend=target.backend,
        )
        out.loss.backward()
        found = {
            "loss": out.loss.detach(),
            "metrics": out.metrics.values[: len(POLICY_METRICS)],
            "step_log_ratio": out.step_log_ratio,
            "grad_log_probs": x.grad,
            "grad_entropy": h.grad,
        }
        for name, value in found.items():
            exact = wanted[name].to(value)
            torch.testing.assert_close(value.cpu(), exact.cpu(), msg=name, **tolerance)


def test_rows_of_a_step_in_every_order(target):
    """With full rows, many of these orders have the first and last position of a range."""
    mask = torch.ones(6, 3, dtype=torch.bool)
    orders = list(itertools.permutations(range(4)))
    for order in orders[::7] if target.interpreted else orders:
        # The trajectory "a" takes four rows, "b" has one before and one behind.
        layout, steps = shuffled(mask, ["b", *"aaaa", "b"], [0, *order, 1], target.device)
        check(layout, steps, target)


def test_ends_of_a_range_with_a_foreign_token_inside(target):
    # 0, 1, 6, 7, 4, 5: the last is the first plus five, and 2 and 3 are the other step's.
    mask = torch.ones(5, 2, dtype=torch.bool)
    layout, steps = shuffled(mask, [*"abaab"], [0, 0, 2, 1, 1], target.device)
    check(layout, steps, target)
    # 2, 3, 6, 7, 4: five positions, of which the first and last are 2 apart.
    mask = torch.tensor([[0, 0], [1, 1], [1, 0], [1, 1]], dtype=torch.bool)
    layout, steps = shuffled(mask, ["b", "a", "a", "a"], [0, 0, 2, 1], target.device)
    check(layout, steps, target)
    # 0, 1, 4, 5, 2, 3 and 6, 7: the ends of the first are 3 apart, those of both are a range's.
    mask = torch.ones(4, 2, dtype=torch.bool)
    layout, steps = shuffled(mask, ["a", "a", "a", "a"], [0, 2, 1, 3], target.device)
    check(layout, steps, target)
    # 0, 1, 6, 7, 2 with 3 masked: the step ends where one of its length would.
    mask = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1]], dtype=torch.bool)
    layout, steps = shuffled(mask, ["a", "a", "b", "a"], [0, 2, 0, 1], target.device)
    check(layout, steps, target)
    # Rows of one position make a step whose last token is the first one's neighbour.
    mask = torch.ones(5, 1, dtype=torch.bool)
    layout, steps = shuffled(mask, ["a", "a", "a", "b", "b"], [0, 2, 1, 0, 1], target.device)
    check(layout, steps, target)


def test_last_less_first_is_the_length_less_one_but_the_tokens_are_elsewhere(target):
    """The step is 0, 1, 9, 3: four positions from 0 to 3, and 2 is another step's."""
    mask = torch.zeros(10, 1, dtype=torch.bool)
    mask[[0, 1, 2, 3, 9]] = True
    names = ["a", "a", "b", "a", *["c"] * 5, "a"]
    layout, steps = shuffled(mask, names, [0, 1, 0, 3, 0, 1, 2, 3, 4, 2], target.device)
    assert layout.token_index[:4].tolist() == [0, 1, 9, 3]
    check(layout, steps, target)
    check(layout, steps, target, torch.float32)


def test_a_layout_that_is_changed_is_looked_at_again(target):
    """The first loss of a layout may keep what it found; another layout keeps nothing of it."""
    first, steps = shuffled(torch.ones(4, 1).bool(), ["a"] * 4, [0, 1, 2, 3], target.device)
    check(first, steps, target)
    mask = torch.ones(5, 1).bool()
    second, steps = shuffled(mask, [*"aaaba"], [0, 1, 3, 0, 2], target.device)
    check(second, steps, target)


def test_shuffled_rows_change_nothing_else(target):
    """Broadcast, advantages and the value loss of such steps are those of the rows in order."""
    order = [0, 3, 1, 2]
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    plain, _ = shuffled(mask, [*"aabb"], [0, 1, 0, 1], target.device)
    # Row k of the shuffled batch is row order[k] of the plain one.
    moved, _ = shuffled(mask[order], [*"abab"], [0, 1, 1, 0], target.device)
    values, rewards = (numbers(mask.shape, seed, target.device) for seed in (1, 2))
    results = []
    for layout, rows in ((plain, [0, 1, 2, 3]), (moved, order)):
        v = values[rows].requires_grad_()
        adv = step_gae(rewards[rows], v, layout, backend=target.backend)
        loss = step_value_loss(v, adv.returns, layout, backend=target.backend).loss
        per_step = adv.returns.clone().requires_grad_()
        spread = broadcast_to_tokens(per_step, layout, backend=target.backend)
        (grad,) = torch.autograd.grad((spread * rewards[rows]).sum(), per_step)
        (grad_values,) = torch.autograd.grad(loss, v)
        back = torch.tensor(rows, device=target.device).argsort()
        results.append(
            (adv.advantages, adv.returns, loss, spread.detach()[back], grad, grad_values[back])
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_shuffled_rows(kernel, dtype):
    generator = torch.Generator().manual_seed(3)
    rows, length = (12, 5) if kernel.interpreted else (600, 37)
    mask = torch.rand(rows, length, generator=generator) < 0.9
    order = torch.randperm(rows, generator=generator).tolist()
    names = torch.randint(0, rows // 5, (rows,), generator=generator).tolist()
    layout, steps = shuffled(mask, names, order, kernel.device)
    check(layout, steps, kernel, dtype)
