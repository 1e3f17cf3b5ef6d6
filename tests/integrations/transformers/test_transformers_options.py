"""What a batch holds besides log-probs reaches the loss: config, weights, bounds, entropy."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="the demo's extra is not installed")

from methods import FEW, Method
from tiny_models import (
    LENGTH,
    ON_BACKENDS,
    ROWS,
    Batch,
    assert_same,
    fused_batch,
    gradients,
    make,
    old_and_ref,
    unfused,
    unfused_loss,
)

from steppo_kernels.integrations.transformers import StepPOBatch, patch_lm_head


@ON_BACKENDS
def test_bounds_of_steps(backend: str) -> None:
    model, batch = make(), Batch()
    values = old_and_ref(model, batch)
    bounds = {
        "clip_low": torch.linspace(0.01, 0.6, batch.layout.num_steps, dtype=torch.float64),
        "clip_high": torch.linspace(0.8, 0.01, batch.layout.num_steps, dtype=torch.float64),
    }
    of_config = unfused_loss(model, batch, values)
    gradients(model)
    expected_loss = unfused_loss(model, batch, values, **bounds)
    expected = gradients(model)
    assert not torch.allclose(expected_loss, of_config)
    patch_lm_head(model)
    out = model(**batch.inputs, steppo=fused_batch(batch, values, backend=backend, **bounds))
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), expected_loss, rtol=1e-6, atol=1e-6)
    assert_same(gradients(model), expected, 1e-6)


@pytest.mark.parametrize("method", FEW.values(), ids=FEW)
@pytest.mark.parametrize("masked", [False, True], ids=["layout", "mask"])
@ON_BACKENDS
def test_every_surrogate_with_numbers_of_tokens(backend: str, masked: bool, method: Method) -> None:
    """Each token keeps its own advantage and weight, though it is predicted a place before."""
    model, batch = make(), Batch()
    values = old_and_ref(model, batch)
    random = torch.Generator().manual_seed(2)
    advantages, weights = torch.randn(2, ROWS, LENGTH, generator=random, dtype=torch.float64)
    unread = torch.where(batch.mask, 0.0, torch.nan)
    values["advantages"] = advantages + unread
    options = {
        "config": method.config(kl_coef=0.1, entropy_coef=0.05, reduction="token_mean"),
        "is_weights": weights.abs() + unread,
        "normalizer": 5.0,
        **method.center(),
    }
    if not masked:
        options["step_weights"] = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
    expected_loss = unfused_loss(model, batch, values, **options)
    expected = gradients(model)
    patch_lm_head(model)
    layout = batch.mask if masked else batch.layout
    request = fused_batch(batch, values, layout, backend=backend, **options)
    out = model(**batch.inputs, steppo=request)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), expected_loss, rtol=1e-6, atol=1e-6)
    assert_same(gradients(model), expected, 1e-6)
    assert any(bool(grad.any()) for grad in expected.values())


@ON_BACKENDS
def test_reported_entropy(backend: str) -> None:
    model, batch = make(), Batch()
    entropy = unfused(model, batch)[1]
    steps = [entropy[batch.layout.step_ids == step].mean() for step in range(6)]
    patch_lm_head(model)
    found = []
    for report in (False, True):
        request = StepPOBatch(
            None, batch.advantages, batch.layout, report_entropy=report, backend=backend
        )
        out = model(**batch.inputs, steppo=request)
        out.loss.backward()
        found.append((out.steppo.metrics["entropy"], out.loss.detach(), gradients(model)))
    (nothing, loss, expected), (reported, same_loss, got) = found
    assert nothing == 0
    torch.testing.assert_close(reported, torch.stack(steps).mean(), rtol=1e-6, atol=1e-6)
    # Only the metric tells them apart.
    assert torch.equal(same_loss, loss)
    assert_same(got, expected, 1e-12)
