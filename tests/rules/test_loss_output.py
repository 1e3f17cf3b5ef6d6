"""What a loss returns: a tensor of the caller's own, and metrics as exact as their inputs."""

from __future__ import annotations

import math

import pytest
import torch

from steppo_kernels import StepLayout, StepPOConfig, StepPOOutput, step_value_loss, steppo_loss

_MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]], dtype=torch.bool)


def numbers(target, shape=(2, 4), seed=0, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (scale * made).to(target.device)


def outputs(target, form, x):
    mask = _MASK.to(target.device)
    layout = StepLayout.from_mask(mask)
    if form == "value":
        return step_value_loss(x, numbers(target, (3,), 1), layout, backend=target.backend)
    advantages = numbers(target, (2, 4), 1)
    given = mask if form == "mask" else layout
    config = StepPOConfig(clip_low=0.9, clip_high=9.0)
    old = numbers(target, seed=2)
    return steppo_loss(x, old, advantages, given, config=config, backend=target.backend)


@pytest.mark.parametrize("form", ["layout", "mask", "value"])
@pytest.mark.parametrize("records", [True, False], ids=["gradient", "no-gradient"])
def test_the_loss_may_be_changed_in_place(target, form, records):
    x = numbers(target).requires_grad_(records)
    out = outputs(target, form, x)
    value, metrics = out.loss.item(), out.metrics.as_dict()
    assert out.loss.shape == ()
    assert out.loss._base is None
    out.loss /= 4
    out.loss *= 2
    out.loss.mul_(0.5).add_(1.0)
    assert isinstance(out, StepPOOutput)
    assert out.loss.item() == pytest.approx(value / 4 + 1, rel=1e-15)
    assert out.metrics.as_dict() == metrics
    if not records:
        return
    out.loss.backward()
    y = x.detach().clone().requires_grad_()
    outputs(target, form, y).loss.backward()
    assert y.grad.any()
    torch.testing.assert_close(x.grad, y.grad / 4, rtol=1e-15, atol=0)


@pytest.mark.parametrize("form", ["layout", "mask", "value"])
def test_the_metrics_may_be_changed_in_place(target, form):
    """Ranks add theirs up in place, and may do so before the backward pass."""
    grads = []
    for is_changed in (False, True):
        x = numbers(target).requires_grad_()
        out = outputs(target, form, x)
        if is_changed:
            out.metrics.values.zero_()
        out.loss.backward()
        grads.append(x.grad)
    assert grads[0].any()
    assert torch.equal(*grads)


def exact_k3(d):
    """e^d - 1 - d, without the difference of numbers that are nearly the same."""
    return math.fsum(d**k / math.factorial(k) for k in range(2, 60))


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 0.05, 0.3, 2.0], ids=str)
def test_metrics_of_fp64_are_fp64(target, masked, scale):
    """A policy that hardly moved has a small penalty, of which no digit is lost."""
    config = StepPOConfig(clip_low=0.2, clip_high=0.2, kl_coef=0.5)
    x, old, ref = numbers(target, seed=3), numbers(target, seed=4), numbers(target, seed=5)
    old, ref = x + scale * old, x + scale * ref
    mask = _MASK.to(target.device)
    advantages = torch.where(mask, torch.tensor(0.7, dtype=torch.float64).to(mask.device), 0.0)
    out = steppo_loss(
        x.requires_grad_(),
        old,
        advantages,
        mask if masked else StepLayout.from_mask(mask),
        config=config,
        ref_log_probs=ref,
        backend=target.backend,
    )
    out.loss.backward()
    z, d = ((a - b).cpu().tolist() for a, b in ((x.detach(), old), (ref, x.detach())))
    steps = [[(0, 0), (0, 1)], [(0, 3)], [(1, 1), (1, 2), (1, 3)]]
    tokens = [token for step in steps for token in step]
    ratios = [math.exp(math.fsum(z[r][t] for r, t in step) / len(step)) for step in steps]
    kl = [math.fsum(exact_k3(d[r][t]) for r, t in step) / len(step) for step in steps]
    wanted = {
        "kl_loss": math.fsum(kl) / 3,
        "ratio_mean": math.fsum(ratios) / 3,
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "approx_kl": -math.fsum(z[r][t] for r, t in tokens) / 6,
        "approx_kl_k3": math.fsum(exact_k3(z[r][t]) for r, t in tokens) / 6,
    }
    # z and d come of one subtraction here and there.
    for name, value in wanted.items():
        assert out.metrics[name].item() == pytest.approx(value, rel=1e-12, abs=0), name
    for step, ratio in zip(steps, ratios, strict=True):
        slope = -0.7 * ratio if ratio <= 1.2 else 0.0
        for r, t in step:
            grad = (slope - 0.5 * math.expm1(d[r][t])) / len(step) / 3
            assert x.grad[r, t].item() == pytest.approx(grad, rel=1e-12, abs=0)


def test_a_mask_of_any_bytes_is_read_as_torch_reads_it(kernel):
    """A bool tensor made of other bytes than 0 and 1 is True wherever a byte is not 0."""
    generator = torch.Generator().manual_seed(8)
    values = torch.tensor([0, 1, 2, 4, 64, 128, 254, 255], dtype=torch.uint8)
    for length in (31,) if kernel.interpreted else (1, 31, 64, 97, 200):
        raw = values[torch.randint(0, 8, (3, length), generator=generator)]
        raw[torch.rand(raw.shape, generator=generator) < 0.3] = 0
        raw = raw.to(kernel.device)
        x, old, advantages = (numbers(kernel, raw.shape, seed) for seed in range(3))
        for reduction in ("step_mean", "trajectory_mean", "token_mean"):
            config = StepPOConfig(ratio="centered", reduction=reduction)
            found = []
            for mask in (raw.view(torch.bool), raw != 0):
                y = x.clone().requires_grad_()
                out = steppo_loss(y, old, advantages, mask, config=config, backend=kernel.backend)
                out.loss.backward()
                found.append((out.loss.detach(), out.metrics.values, y.grad))
            for one, other in zip(*found, strict=True):
                assert torch.equal(one, other), (length, reduction)
