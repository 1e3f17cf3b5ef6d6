"""Corners of the public functions that once went wrong in one backend or another."""

from __future__ import annotations

import pytest
import torch

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    broadcast_to_tokens,
    step_gae,
    step_value_loss,
    steppo_loss,
)
from steppo_kernels.outputs import POLICY_METRICS
from steppo_kernels.testing import random_batch

_WIDE = StepPOConfig(clip_low=0.9, clip_high=9.0)


def tensor(values, device, **options):
    return torch.tensor(values, device=device, dtype=torch.float64, **options)


def two_steps(target):
    mask = torch.tensor([[1, 1, 0, 1]], device=target.device, dtype=torch.bool)
    return mask, StepLayout.from_mask(mask, backend=target.backend)


@pytest.mark.parametrize("view", ["last", "columns", "expanded"])
def test_masks_of_any_strides(target, view):
    wide = torch.rand(4, 8, 2, generator=torch.Generator().manual_seed(0)) > 0.5
    mask = {
        "last": wide[..., 0],
        "columns": wide[:, ::2, 1],
        "expanded": wide[:1, :1, 0].expand(4, 8),
    }
    mask = mask[view].to(target.device)
    x = -torch.rand(mask.shape, device=target.device)
    found, wanted = (
        steppo_loss(x, x - 0.1, torch.ones_like(x), m, config=_WIDE, backend=target.backend)
        for m in (mask, mask.clone(memory_format=torch.contiguous_format))
    )
    assert torch.equal(found.metrics.values, wanted.metrics.values)
    assert found.metrics["num_tokens"] == mask.sum()


def test_a_nan_on_an_action_token_reaches_its_step_and_the_loss(target):
    mask, layout = two_steps(target)
    for steps, advantages in ((layout, [1.0, 1.0]), (mask, [[1.0] * 4])):
        x = tensor([[-1.0, torch.nan, 0.0, -1.0]], target.device, requires_grad=True)
        out = steppo_loss(
            x, tensor([[-1.0] * 4], target.device), tensor(advantages, target.device), steps,
            config=_WIDE, backend=target.backend,
        )  # fmt: skip
        out.loss.backward()
        assert out.loss.isnan()
        assert x.grad.isnan().tolist() == [[True, True, False, False]]
        assert out.metrics["dead_token_fraction"] == 0


def test_an_impossible_token(target):
    """log pi = -inf: the ratio is 0, the loss is finite."""
    _, layout = two_steps(target)
    x = tensor([[0.0, -torch.inf, 0.0, -1.0]], target.device, requires_grad=True)
    out = steppo_loss(
        x, tensor([[-1.0] * 4], target.device), tensor([1.0, 1.0], target.device), layout,
        config=_WIDE, backend=target.backend,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == -0.5
    assert x.grad.tolist() == [[0.0, 0.0, 0.0, -0.5]]


def test_kl_at_its_clamp_keeps_the_gradient(target):
    _, layout = two_steps(target)
    x = tensor([[-0.5] * 4], target.device, requires_grad=True)
    config = StepPOConfig(kl_coef=1.0, kl_estimator="k1")
    out = steppo_loss(
        x, x.detach(), tensor([0.0, 0.0], target.device), layout, config=config,
        ref_log_probs=x.detach() - 10.0, backend=target.backend,
    )  # fmt: skip
    out.loss.backward()
    assert x.grad.tolist() == [[0.25, 0.25, 0.0, 0.5]]
    assert out.metrics["dead_token_fraction"] == 0


def test_a_token_is_dead_if_its_whole_coefficient_is_zero(target):
    """Policy -A and KL +1 cancel."""
    _, layout = two_steps(target)
    x = tensor([[-0.5] * 4], target.device, requires_grad=True)
    config = StepPOConfig(kl_coef=1.0, kl_estimator="k1")
    out = steppo_loss(
        x, None, tensor([1.0, 1.0], target.device), layout, config=config,
        ref_log_probs=x.detach(), backend=target.backend,
    )  # fmt: skip
    out.loss.backward()
    assert not x.grad.any()
    assert out.metrics["dead_token_fraction"] == 1


def test_on_policy_ratios_are_one_whatever_the_center(target):
    _, layout = two_steps(target)
    x = tensor([[-0.5] * 4], target.device)
    out = steppo_loss(
        x, None, tensor([1.0, 1.0], target.device), layout, ratio_center=0.5,
        config=StepPOConfig(ratio="centered"), backend=target.backend,
    )  # fmt: skip
    assert out.metrics["ratio_min"] == out.metrics["ratio_max"] == 1


def test_an_infinite_weight_does_not_wake_a_dead_step(target):
    _, layout = two_steps(target)
    x = tensor([[-0.5] * 4], target.device, requires_grad=True)
    out = steppo_loss(
        x, x.detach(), tensor([0.0, 1.0], target.device), layout,
        is_weights=tensor([torch.inf, 1.0], target.device), backend=target.backend,
    )  # fmt: skip
    out.loss.backward()
    assert x.grad.tolist() == [[0.0, 0.0, 0.0, -0.5]]


def test_equal_advantages_whiten_to_zero(target):
    mask = torch.ones(7, 1, device=target.device, dtype=torch.bool)
    layout = StepLayout.from_mask(mask, backend=target.backend)
    rewards = torch.full((7,), 0.1, device=target.device)
    found = step_gae(rewards, torch.zeros_like(rewards), layout, backend=target.backend)
    assert found.advantages.abs().max() < 1e-6


def test_an_empty_response_keeps_its_reward(target):
    mask = torch.tensor([[1, 1], [0, 0], [1, 1]], device=target.device, dtype=torch.bool)
    layout = StepLayout.from_rows(mask, [0, 0, 0], [0, 1, 2], backend=target.backend)
    rewards = tensor([[0.0, 0.0], [5.0, torch.nan], [0.0, 0.0]], target.device)
    found = step_gae(
        rewards, torch.zeros(3, device=target.device, dtype=torch.float64), layout, gamma=1.0,
        whiten=False, backend=target.backend,
    )  # fmt: skip
    assert found.returns.tolist() == [5.0, 5.0, 0.0]


def test_a_nan_old_value_reaches_the_loss(target):
    _, layout = two_steps(target)
    values = tensor([1.0, 2.0], target.device, requires_grad=True)
    out = step_value_loss(
        values, torch.zeros_like(values.detach()), layout, backend=target.backend,
        old_values=tensor([torch.nan, 0.0], target.device),
    )  # fmt: skip
    assert out.loss.isnan()


def test_the_broadcast_is_linear_twice_over(target):
    _, layout = two_steps(target)
    per_step = tensor([1.0, 2.0], target.device, requires_grad=True)

    def spread(x):
        return broadcast_to_tokens(x, layout, backend=target.backend)

    assert torch.autograd.gradgradcheck(spread, (per_step,))


def test_metrics_by_name():
    batch = random_batch(3, 2, 9)
    metrics = steppo_loss(
        batch.log_probs, batch.old_log_probs, batch.advantages, batch.layout, backend="reference"
    ).metrics
    assert list(metrics) == list(POLICY_METRICS)
    values = dict(metrics)
    assert {name: value.item() for name, value in values.items()} == metrics.as_dict()
    with pytest.raises(KeyError, match="'clip', expected one of policy_loss, kl_loss"):
        metrics["clip"]
