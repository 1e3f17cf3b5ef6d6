"""StepPOLoss and StepValueLoss keep hyper-parameters and call the functions."""

from __future__ import annotations

import torch
from batches import random_batch
from grids import grid
from methods import FEW, METHODS

from steppo_kernels import StepPOConfig, StepPOLoss, StepValueLoss, step_value_loss, steppo_loss


def test_steppo_loss(target, masked):
    batch = random_batch(1, device=target.device)
    config = StepPOConfig(clip_low=0.2, clip_high=0.3, kl_coef=0.1, entropy_coef=0.2)
    module = StepPOLoss(config, backend=target.backend)
    args = (
        batch.log_probs.requires_grad_(),
        batch.old_log_probs,
        batch.on_tokens(batch.advantages) if masked else batch.advantages,
        batch.mask if masked else batch.layout,
    )
    options = {
        "ref_log_probs": batch.ref_log_probs,
        "entropy": batch.entropy,
        "is_weights": batch.token_weights,
        "normalizer": 3.0,
    }
    result = module(*args, **options)
    expected = steppo_loss(*args, config=config, backend=target.backend, **options)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(result.metrics.values, expected.metrics.values)
    result.loss.backward()
    (grad,) = torch.autograd.grad(expected.loss, args[0])
    assert torch.equal(batch.log_probs.grad, grad)


@grid(method=METHODS, interpreted={"method": FEW})
def test_every_surrogate_with_numbers_of_tokens(target, masked, method):
    batch = random_batch(4, 3, 20, ratio=method.ratio, device=target.device)
    advantages = batch.entropy - 1.5
    layout = batch.mask if masked else batch.layout
    args = batch.log_probs.requires_grad_(), batch.old_log_probs, advantages, layout
    options = {"is_weights": batch.token_weights, **method.center()}
    results = []
    held = {"config": method.config(), "backend": target.backend}
    for out in (StepPOLoss(**held)(*args, **options), steppo_loss(*args, **options, **held)):
        (grad,) = torch.autograd.grad(out.loss, args[0])
        results.append((out.loss.detach(), out.metrics.values, grad))
    assert results[0][2].any()
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_bounds_of_steps_replace_those_of_the_config(target):
    batch = random_batch(3, device=target.device, log_ratios=(-0.5, 0.5))
    module = StepPOLoss(backend=target.backend)
    args = batch.log_probs, batch.old_log_probs, batch.advantages, batch.layout
    bounds = {
        "clip_low": torch.linspace(0.05, 0.4, batch.layout.num_steps, device=target.device),
        "clip_high": torch.linspace(0.4, 0.05, batch.layout.num_steps, device=target.device),
    }
    result = module(*args, **bounds)
    expected = steppo_loss(*args, backend=target.backend, **bounds)
    assert torch.equal(result.metrics.values, expected.metrics.values)
    assert not torch.equal(result.loss, module(*args).loss)


def test_step_value_loss(target):
    batch = random_batch(2, device=target.device)
    module = StepValueLoss(0.3, reduction="token_mean", backend=target.backend)
    args = batch.values.requires_grad_(), batch.returns, batch.layout
    result = module(*args, old_values=batch.old_values, normalizer=5.0)
    expected = step_value_loss(
        *args,
        old_values=batch.old_values,
        clip=0.3,
        reduction="token_mean",
        normalizer=5.0,
        backend=target.backend,
    )
    assert torch.equal(result.loss, expected.loss)
    other = StepValueLoss(backend=target.backend)(*args, old_values=batch.old_values)
    assert not torch.equal(other.loss, result.loss)


def test_modules_say_what_they_hold_and_have_no_parameters():
    policy, value = StepPOLoss(), StepValueLoss(0.25, reduction="sum")
    assert policy.config == StepPOConfig()
    assert "clip_low=0.0003" in repr(policy)
    assert "backend='auto'" in repr(policy)
    assert "clip=0.25, reduction='sum', backend='auto'" in repr(value)
    assert not list(policy.parameters()) + list(value.parameters())
