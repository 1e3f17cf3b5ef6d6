"""Sizes at which kernels change: many rows, one token, odd lengths, a step of everything."""

from __future__ import annotations

import pytest
import torch
from batches import policy_results, random_batch
from functions_of_steps import TERMS, everything
from grids import grid
from methods import FEW

from steppo_kernels import StepLayout, StepPOConfig, steppo_loss

# More rows than a grid's second dimension, which take the interpreter minutes. One row, one token,
# odd sizes, one step that is huge.
_SIZES = {
    "70001x3": (70_001, 3, 2.0),
    "1x1": (1, 1, 2.0),
    "1x7": (1, 7, 2.0),
    "13x1": (13, 1, 2.0),
    "5x1023": (5, 1023, 300.0),
    "3x4099": (3, 4099, 2.0),
}


@pytest.mark.isa
@grid(cover=1, interpreted={"size": list(_SIZES)[1:]}, size=list(_SIZES), method=FEW)
def test_sizes(kernel, size, method):
    rows, length, mean_step = _SIZES[size]
    if kernel.emulated and rows * length > 100_000:
        pytest.skip("as many tokens take the CPU minutes")
    # Ratios are such that no weight of the soft surrogate is rounded to 0.
    batch = random_batch(
        15,
        rows,
        length,
        ratio=method.ratio,
        mean_step=mean_step,
        log_ratios=(-9.0, 3.0),
        dtype=torch.float64,
    )
    config = method.config(**TERMS)
    exact = everything(batch, "reference", config)
    found = everything(batch.to(torch.float64, kernel.device), kernel.backend, config)
    for name, value in exact.items():
        scale = float(value.abs().max()) if value.numel() else 1.0
        torch.testing.assert_close(
            found[name].cpu(),
            value,
            rtol=1e-9,
            atol=1e-11 * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.isa
@grid(
    cover=1,
    form=["one-huge-step", "steps-of-one-token", "one-step-among-many"],
    method=FEW,
)
def test_extreme_steps(kernel, form, method):
    total = 1_000_003 if form == "one-huge-step" else 50_003
    if kernel.interpreted:
        total = 6_001
    mask = torch.ones((1, total), dtype=torch.bool)
    if form == "steps-of-one-token":
        mask[:, 1::2] = False
    elif form == "one-step-among-many":
        mask[:, : total // 2 : 2] = False
    batch = random_batch(
        16, mask=mask, ratio=method.ratio, log_ratios=(-0.4, 0.4), dtype=torch.float64
    )
    config = method.config(**TERMS, reduction="token_mean")
    moved = batch.to(torch.float64, kernel.device)
    for masked in (False, True):
        exact = policy_results(batch, config, "reference", masked=masked)
        found = policy_results(moved, config, kernel.backend, masked=masked)
        for name, value in exact.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(found[name].cpu(), value, rtol=1e-9, atol=1e-11 * scale)


@pytest.mark.parametrize("ratio", ["token", "geometric", "product"])
def test_fp32_sums_of_a_very_long_step(target, ratio):
    """Added one after another in fp32, its terms would lose three of seven digits."""
    if target.interpreted:
        pytest.skip("as many tokens take the CPU minutes")
    length = 200_000
    generator = torch.Generator().manual_seed(2)
    log_probs = -torch.rand(1, length, generator=generator)
    change = 1e-3 * torch.randn(1, length, generator=generator)
    given = [value.to(target.device) for value in (log_probs, log_probs + change)]
    layout = StepLayout.from_mask(torch.ones(1, length, device=target.device))
    leaf = given[0].requires_grad_()
    loss = steppo_loss(
        leaf,
        given[1],
        torch.tensor([0.8], device=target.device),
        layout,
        config=StepPOConfig(ratio=ratio, clip_low=0.9, clip_high=9.0),
        backend=target.backend,
    ).loss
    (grad,) = torch.autograd.grad(loss, leaf)
    z = given[0].detach().double() - given[1].double()
    powers = {"token": z.exp(), "geometric": z.mean().exp(), "product": z.sum().exp()}
    wanted = -0.8 * powers[ratio]
    assert loss.item() == pytest.approx(wanted.mean().item(), rel=2e-6)
    per_token = wanted if ratio == "product" else wanted / length
    torch.testing.assert_close(grad.double(), per_token.expand_as(grad), rtol=2e-6, atol=0.0)
