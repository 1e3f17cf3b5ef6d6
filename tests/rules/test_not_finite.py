"""NaN and infinities at action tokens: they show where they belong, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from batches import fp64, two_steps

from steppo_kernels import (
    StepPOConfig,
    linear_steppo_loss,
    step_value_loss,
    steppo_loss,
)

_WIDE = StepPOConfig(clip_low=0.9, clip_high=9.0)


def test_a_nan_on_an_action_token_reaches_its_step_and_the_loss(target):
    mask, layout = two_steps(target)
    for steps, advantages in ((layout, [1.0, 1.0]), (mask, [[1.0] * 4])):
        x = fp64([[-1.0, torch.nan, 0.0, -1.0]], target.device, requires_grad=True)
        out = steppo_loss(
            x,
            fp64([[-1.0] * 4], target.device),
            fp64(advantages, target.device),
            steps,
            config=_WIDE,
            backend=target.backend,
        )
        out.loss.backward()
        assert out.loss.isnan()
        assert x.grad.isnan().tolist() == [[True, True, False, False]]
        assert out.metrics["dead_token_fraction"] == 0


@pytest.mark.parametrize("ratio", ["geometric", "centered"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf], ids=str)
def test_what_is_not_finite_shows_on_policy(target, value, ratio):
    """It shows in its step and in the loss. Other steps keep their ratio of 1."""
    mask, layout = two_steps(target)
    config = StepPOConfig(ratio=ratio)
    for steps, advantages in ((layout, [1.0, 1.0]), (mask, [[1.0] * 4])):
        x = fp64([[-1.0, value, 0.0, -1.0]], target.device, requires_grad=True)
        out = steppo_loss(
            x,
            None,
            fp64(advantages, target.device),
            steps,
            config=config,
            backend=target.backend,
        )
        out.loss.backward()
        assert out.loss.isnan()
        assert out.metrics["ratio_mean"].isnan()
        assert x.grad.isnan().tolist() == [[True, True, False, False]]
        assert x.grad[0, 3] == -0.5


@pytest.mark.parametrize("ratio", ["geometric", "centered"])
def test_what_is_not_finite_shows_on_policy_from_hidden_states(target, ratio):
    _, layout = two_steps(target)
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn((1, 4, 3), generator=generator, dtype=torch.float64).to(target.device)
    weight = torch.randn((7, 3), generator=generator, dtype=torch.float64).to(target.device)
    ids = torch.tensor([[1, 2, 3, 4]], device=target.device)
    broken = clean.clone()
    broken[0, 1, 0] = torch.nan
    found = []
    for hidden in (clean, broken):
        leaf = hidden.requires_grad_()
        out = linear_steppo_loss(
            leaf,
            weight,
            ids,
            None,
            fp64([1.0, -2.0], target.device),
            layout,
            config=StepPOConfig(ratio=ratio),
            backend=target.backend,
        )
        out.loss.backward()
        found.append((out.loss, leaf.grad))
    assert found[0][0].isfinite()
    assert found[1][0].isnan()
    assert found[1][1][0, :2].isnan().all()
    torch.testing.assert_close(found[1][1][0, 2:], found[0][1][0, 2:], rtol=1e-12, atol=0)


def test_an_impossible_token(target):
    """log pi = -inf: the ratio is 0, the loss is finite."""
    _, layout = two_steps(target)
    x = fp64([[0.0, -torch.inf, 0.0, -1.0]], target.device, requires_grad=True)
    out = steppo_loss(
        x,
        fp64([[-1.0] * 4], target.device),
        fp64([1.0, 1.0], target.device),
        layout,
        config=_WIDE,
        backend=target.backend,
    )
    out.loss.backward()
    assert out.loss.item() == -0.5
    assert x.grad.tolist() == [[0.0, 0.0, 0.0, -0.5]]


def test_an_infinite_weight_does_not_wake_a_dead_step(target):
    _, layout = two_steps(target)
    x = fp64([[-0.5] * 4], target.device, requires_grad=True)
    out = steppo_loss(
        x,
        x.detach(),
        fp64([0.0, 1.0], target.device),
        layout,
        is_weights=fp64([torch.inf, 1.0], target.device),
        backend=target.backend,
    )
    out.loss.backward()
    assert x.grad.tolist() == [[0.0, 0.0, 0.0, -0.5]]


def test_a_nan_old_value_reaches_the_loss(target):
    _, layout = two_steps(target)
    values = fp64([1.0, 2.0], target.device, requires_grad=True)
    out = step_value_loss(
        values,
        torch.zeros_like(values.detach()),
        layout,
        backend=target.backend,
        old_values=fp64([torch.nan, 0.0], target.device),
    )
    assert out.loss.isnan()
