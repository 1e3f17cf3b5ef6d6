"""Inputs of any strides and dtypes give what contiguous ones of the right dtype give."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from batches import policy_results, random_batch
from functions_of_steps import CONFIG, ON_TOKENS, assert_bitwise, everything
from grids import grid

from steppo_kernels import (
    StepPOConfig,
    broadcast_to_tokens,
    step_gae,
    step_value_loss,
    steppo_loss,
)


@grid(view=["transposed", "strided", "sliced", "flat", "expanded"])
def test_inputs_of_any_strides(target, view):
    rows, length = 4, 12
    batch = random_batch(4, rows, length, device=target.device)
    expected = everything(batch, target.backend)

    def as_view(value):
        if view == "transposed":
            return value.T.contiguous().T
        if view == "strided":
            wide = torch.full((rows, 2 * length), torch.nan, device=target.device)
            wide[:, ::2] = value
            return wide[:, ::2]
        if view == "sliced":
            larger = torch.full((rows + 2, length + 9), torch.nan, device=target.device)
            larger[1:-1, 5:-4] = value
            return larger[1:-1, 5:-4]
        if view == "flat":
            return value.reshape(-1)
        return value[None].expand(1, rows, length)[0]

    viewed = {name: as_view(getattr(batch, name)) for name in (*ON_TOKENS, "rewards")}
    log_probs, entropy = (
        viewed[name].detach().requires_grad_() for name in ("log_probs", "entropy")
    )
    for masked in (False, True):
        advantages = as_view(batch.on_tokens(batch.advantages)) if masked else batch.advantages
        result = steppo_loss(
            log_probs,
            viewed["old_log_probs"],
            advantages,
            batch.mask.T.contiguous().T if masked else batch.layout,
            config=CONFIG,
            ref_log_probs=viewed["ref_log_probs"],
            entropy=entropy,
            is_weights=viewed["token_weights"],
            backend=target.backend,
        )
        grads = torch.autograd.grad(result.loss, (log_probs, entropy))
        assert torch.equal(result.loss, expected[f"loss, {masked=}"])
        for grad, name in zip(grads, ("grad_log_probs", "grad_entropy"), strict=True):
            assert torch.equal(grad.reshape(rows, length), expected[f"{name}, {masked=}"])
    gae = step_gae(
        viewed["rewards"],
        viewed["values"],
        batch.layout,
        bootstrap_values=batch.bootstrap_values,
        backend=target.backend,
    )
    assert torch.equal(gae.advantages, expected["advantages"])
    values = viewed["values"].detach().requires_grad_()
    result = step_value_loss(
        values,
        batch.returns,
        batch.layout,
        old_values=viewed["old_values"],
        backend=target.backend,
    )
    result.loss.backward()
    assert torch.equal(result.loss, expected["value loss"])
    assert torch.equal(values.grad.reshape(rows, length), expected["grad_values"])
    per_step = torch.stack((batch.advantages, batch.returns), 1)[:, 0]
    spread = broadcast_to_tokens(per_step, batch.layout, backend=target.backend)
    assert torch.equal(spread, expected["broadcast"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(target, masked, dtype):
    """Computed in fp32 from the half precision values; gradients in the dtype of their input."""
    batch = random_batch(12, 6, 30, log_ratios=(-0.5, 0.5), device=target.device)
    halves = {name: getattr(batch, name).to(dtype) for name in (*ON_TOKENS, "returns")}
    found, expected = {}, {}
    for results, as_type in ((found, dtype), (expected, torch.float32)):
        inputs = {name: value.to(as_type, copy=True) for name, value in halves.items()}
        leaves = [inputs[name].requires_grad_() for name in ("log_probs", "entropy", "values")]
        result = steppo_loss(
            leaves[0],
            inputs["old_log_probs"],
            batch.on_tokens(batch.advantages) if masked else batch.advantages,
            batch.mask if masked else batch.layout,
            config=CONFIG,
            ref_log_probs=inputs["ref_log_probs"],
            entropy=leaves[1],
            is_weights=inputs["token_weights"],
            backend=target.backend,
        )
        values = step_value_loss(
            leaves[2],
            inputs["returns"],
            batch.layout,
            old_values=inputs["old_values"],
            backend=target.backend,
        )
        (result.loss + values.loss).backward()
        assert result.loss.dtype == values.loss.dtype == torch.float32
        results |= {"loss": result.loss, "value loss": values.loss, "leaves": leaves}
    for name in ("loss", "value loss"):
        assert torch.equal(found[name], expected[name])
    for leaf, exact in zip(found["leaves"], expected["leaves"], strict=True):
        assert leaf.grad.dtype == dtype
        assert torch.equal(leaf.grad, exact.grad.to(dtype))


def test_fp64_stays_fp64(target, masked):
    batch = random_batch(13, dtype=torch.float64, device=target.device)
    found = policy_results(batch, CONFIG, target.backend, masked=masked)
    assert {value.dtype for value in found.values()} == {torch.float64}
    gae = step_gae(batch.rewards, batch.values, batch.layout, backend=target.backend)
    assert gae.advantages.dtype == gae.returns.dtype == torch.float64
    spread = broadcast_to_tokens(batch.advantages, batch.layout, backend=target.backend)
    assert spread.dtype == torch.float64


def test_other_inputs_follow_the_first(target, masked):
    """fp64 constants with fp32 log-probs: computed in fp32, as the log-probs are."""
    batch = random_batch(14, device=target.device)
    expected = policy_results(batch, CONFIG, target.backend, masked=masked)
    mixed = dataclasses.replace(
        batch.to(torch.float64), log_probs=batch.log_probs, entropy=batch.entropy
    )
    found = policy_results(mixed, CONFIG, target.backend, masked=masked)
    assert_bitwise(found, expected)


@pytest.mark.parametrize("view", ["last", "columns", "expanded"])
def test_masks_of_any_strides(target, view):
    wide = torch.rand(4, 8, 2, generator=torch.Generator().manual_seed(0)) > 0.5
    mask = {
        "last": wide[..., 0],
        "columns": wide[:, ::2, 1],
        "expanded": wide[:1, :1, 0].expand(4, 8),
    }
    mask = mask[view].to(target.device)
    config = StepPOConfig(clip_low=0.9, clip_high=9.0)
    x = -torch.rand(mask.shape, device=target.device)
    found, wanted = (
        steppo_loss(x, x - 0.1, torch.ones_like(x), m, config=config, backend=target.backend)
        for m in (mask, mask.clone(memory_format=torch.contiguous_format))
    )
    assert torch.equal(found.metrics.values, wanted.metrics.values)
    assert found.metrics["num_tokens"] == mask.sum()
