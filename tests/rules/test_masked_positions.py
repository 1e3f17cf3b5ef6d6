"""Masked positions hold anything, and batches no action token: nothing of it shows."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from batches import ragged_mask, random_batch
from functions_of_steps import CONFIG, ON_TOKENS, TERMS, assert_bitwise, everything
from grids import grid
from methods import FEW, METHODS

from steppo_kernels import (
    StepLayout,
    broadcast_to_tokens,
    step_gae,
    step_value_loss,
    steppo_loss,
)
from steppo_kernels.config import RATIOS, REDUCTIONS


@pytest.mark.isa
@grid(
    cover=1,
    method=METHODS,
    garbage=[math.inf, -math.inf, 0.0, 1e38, -1e-42],
    interpreted={"method": FEW},
)
def test_nothing_of_a_masked_position_counts(target, method, garbage):
    """The batch holds NaN there; with anything else, all is the same to the last bit."""
    rows, length = (3, 20) if target.interpreted else (8, 48)
    batch = random_batch(1, rows, length, ratio=method.ratio, device=target.device)
    config = method.config(**TERMS)
    filled = {name: torch.where(batch.mask, getattr(batch, name), garbage) for name in ON_TOKENS}
    expected = everything(batch, target.backend, config)
    found = everything(dataclasses.replace(batch, **filled), target.backend, config)
    for value in found.values():
        assert value.isfinite().all()
    assert_bitwise(found, expected)
    for name in ("grad_log_probs", "grad_entropy"):
        for masked in (False, True):
            assert (found[f"{name}, {masked=}"][~batch.mask] == 0).all()
    assert (found["broadcast"][~batch.mask] == 0).all()
    states = torch.zeros_like(batch.mask).view(-1)
    states[batch.layout.state_index] = True
    assert (found["grad_values"].view(-1)[~states] == 0).all()


@pytest.mark.isa
@grid(cover=1, shape=[(0,), (0, 5), (3, 0), (2, 4)], ratio=RATIOS, reduction=REDUCTIONS)
def test_no_action_token(target, shape, ratio, reduction):
    """Loss 0, finite metrics, zero gradients, and a graph that reaches the inputs."""
    config = dataclasses.replace(CONFIG, ratio=ratio, reduction=reduction)
    mask = torch.zeros(shape, dtype=torch.bool, device=target.device)
    by_mask = StepLayout.from_mask(mask, backend=target.backend)
    layouts = [mask, by_mask, by_mask.per_token(), by_mask.per_trajectory()]
    if len(shape) == 2:
        rows = list(range(shape[0]))
        layouts.append(StepLayout.from_rows(mask, rows, rows, backend=target.backend))
    for layout in layouts:
        nan = torch.full(shape, torch.nan, device=target.device)
        log_probs, entropy, values = (nan.clone().requires_grad_() for _ in range(3))
        steps = nan if layout is mask else nan.new_zeros(layout.num_steps)
        results = [
            steppo_loss(
                log_probs,
                nan,
                steps,
                layout,
                config=config,
                ref_log_probs=nan,
                entropy=entropy,
                is_weights=nan,
                backend=target.backend,
            )
        ]
        if layout is not mask:
            results.append(
                step_value_loss(
                    values,
                    steps,
                    layout,
                    old_values=nan,
                    reduction=reduction,
                    backend=target.backend,
                )
            )
            found = step_gae(nan, nan, layout, backend=target.backend)
            assert found.advantages.shape == found.returns.shape == steps.shape
            spread = broadcast_to_tokens(steps.requires_grad_(), layout, backend=target.backend)
            spread.sum().backward()
            assert torch.equal(spread, torch.zeros(shape, device=target.device))
            assert torch.equal(steps.grad, torch.zeros_like(steps))
        inputs = (log_probs, entropy, values)
        for result in results:
            assert result.loss.item() == 0.0
            assert result.metrics.values.isfinite().all()
            result.loss.backward()
        for value in inputs[: len(results) + 1]:
            assert torch.equal(value.grad, torch.zeros(shape, device=target.device))
        metrics = results[0].metrics.as_dict()
        assert metrics.pop("ratio_mean") == metrics.pop("ratio_min") == 1.0
        assert metrics.pop("ratio_max") == 1.0
        assert set(metrics.values()) == {0.0}


@pytest.mark.isa
@grid(method=METHODS, interpreted={"method": FEW})
def test_empty_steps_count_for_nothing(target, method):
    """A row without action tokens keeps its place in time; its numbers may be anything."""
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 1]], device=target.device)
    valid = torch.tensor([True, True, True, False], device=target.device)
    layout = StepLayout.from_rows(
        mask, [0, 0, 0, 0], [0, 1, 2, 2], valid=valid, backend=target.backend
    )
    nan = torch.nan
    log_probs = torch.tensor(
        [[-0.1, -0.2, nan], [nan, nan, nan], [-0.3, nan, -0.4], [nan, nan, nan]],
        device=target.device,
    ).requires_grad_()
    per_step = torch.tensor([1.0, nan, -2.0, nan], device=target.device)
    # At a temperature of 2, the value of the soft surrogate is -A on-policy, as that of all others.
    numbers = {"soft_temperature": (2.0, 2.0)} if method.surrogate == "soft" else {}
    bounds = (
        {}
        if method.surrogate == "soft"
        else {"clip_low": per_step.abs() * 0 + 0.5, "clip_high": per_step.abs()}
    )
    for reduction in REDUCTIONS:
        log_probs.grad = None
        result = steppo_loss(
            log_probs,
            log_probs.detach(),
            per_step,
            layout,
            is_weights=per_step.abs(),
            step_weights=per_step.abs() * 0 + 1,
            config=method.config(reduction=reduction, **numbers),
            backend=target.backend,
            **bounds,
        )
        result.loss.backward()
        # Two steps: weights 1, losses -1 * 1 and 2 * 2.
        normalizer = {"step_mean": 2, "trajectory_mean": 1, "token_mean": 4, "sum": 1}[reduction]
        assert result.loss.item() == pytest.approx(3.0 / normalizer)
        metrics = result.metrics.as_dict()
        assert (metrics["num_steps"], metrics["num_tokens"]) == (2, 4)
        assert log_probs.grad.isfinite().all()
        assert (log_probs.grad[[1, 3]] == 0).all()
        assert result.step_log_ratio.tolist() == [0.0] * 4
        values = per_step.clone().requires_grad_()
        result = step_value_loss(
            values,
            per_step,
            layout,
            old_values=per_step,
            reduction=reduction,
            backend=target.backend,
        )
        result.loss.backward()
        assert result.loss.item() == 0.0
        assert result.metrics.as_dict()["num_steps"] == 2
        assert values.grad.isfinite().all()


def test_ragged_masks_hold_what_the_tests_rely_on():
    """Runs at both borders of rows, steps of one token, and rows without an action token."""
    mask = ragged_mask(14, 50, generator=torch.Generator().manual_seed(0))
    assert not mask[6].any()
    assert not mask[13].any()
    assert mask[:, 0].any()
    assert mask[:, -1].any()
    lengths = StepLayout.from_mask(mask, backend="reference").step_lengths
    assert int(lengths.min()) == 1
    assert int(lengths.max()) > 8
