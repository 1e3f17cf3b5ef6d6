"""The numbers of a patched causal LM against the same model with logits, and what it costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="the demo's extra is not installed")

import transformers
from tiny_models import (
    FAMILIES,
    LENGTH,
    ON_BACKENDS,
    ROWS,
    SIZES,
    Batch,
    assert_same,
    fused_batch,
    gradients,
    make,
    old_and_ref,
    unfused,
    unfused_loss,
)

from steppo_kernels import StepLayout, StepPOConfig, broadcast_to_tokens, steppo_loss
from steppo_kernels.backends import choice
from steppo_kernels.integrations.transformers import (
    LogProbBatch,
    StepPOBatch,
    StepPOCausalLMOutput,
    patch_lm_head,
)


@ON_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family: str, dtype: torch.dtype, backend: str) -> None:
    model, batch = make(family, dtype), Batch(dtype)
    values = old_and_ref(model, batch)
    expected_loss = unfused_loss(model, batch, values)
    expected = gradients(model)
    with patch_lm_head(model):
        out = model(**batch.inputs, steppo=fused_batch(batch, values, backend=backend))
        out.loss.backward()
    assert isinstance(out, StepPOCausalLMOutput)
    assert out.logits is None
    assert out.log_probs is None
    assert out.steppo.loss is out.loss
    metrics = out.steppo.metrics.as_dict()
    assert metrics["num_steps"] == 6
    assert 0 < metrics["clip_fraction"] < 1
    assert out.steppo.step_log_ratio.shape == (6,)
    # The fp64 models normalise in fp32.
    tolerance = 1e-6 if dtype == torch.float64 else 3e-5
    torch.testing.assert_close(out.loss.detach(), expected_loss, rtol=tolerance, atol=tolerance)
    assert_same(gradients(model), expected, tolerance)


def test_the_settings_after_the_head_matter() -> None:
    """Else the families above would not show that they are honoured."""
    for family, name in (
        ("gemma2", "final_logit_softcapping"),
        ("gemma3", "final_logit_softcapping"),
        ("granite", "logits_scaling"),
        ("cohere", "logit_scale"),
    ):
        model, batch = make(family), Batch()
        with patch_lm_head(model), torch.no_grad():
            expected = unfused(model, batch)[0]
            bare = copy.copy(model.config)
            setattr(bare, name, None if "softcap" in name else 1.0)
            states = model.model(**batch.inputs, use_cache=False).last_hidden_state
            plain = torch.log_softmax(model.lm_head(states)[:, :-1], -1)
        plain = plain.gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
        assert not torch.allclose(expected[:, 1:], plain.where(batch.mask[:, 1:], 0.0), rtol=0.1)


@ON_BACKENDS
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere"])
def test_log_probs_and_entropy(family: str, backend: str) -> None:
    model, batch = make(family), Batch()
    random = torch.Generator().manual_seed(2)
    temperature = 0.5 + torch.rand(ROWS, LENGTH, generator=random, dtype=torch.float64)
    weights = torch.randn(2, ROWS, LENGTH, generator=random, dtype=torch.float64)
    expected = unfused(model, batch, temperature)
    sum(w.mul(x).sum() for w, x in zip(weights, expected, strict=True)).backward()
    expected_gradients = gradients(model)
    patch_lm_head(model)
    request = LogProbBatch(
        batch.layout, temperature=temperature, return_entropy=True, backend=backend
    )
    out = model(**batch.inputs, steppo=request)
    assert out.loss is None
    assert out.steppo is None
    for got, values in zip((out.log_probs, out.entropy), expected, strict=True):
        torch.testing.assert_close(got, values, rtol=1e-6, atol=1e-6)
        assert not got[~batch.mask].any()
    sum(
        w.mul(x).sum() for w, x in zip(weights, (out.log_probs, out.entropy), strict=True)
    ).backward()
    assert_same(gradients(model), expected_gradients, 1e-6)
    with torch.no_grad():
        again = model(**batch.inputs, steppo=LogProbBatch(batch.mask, backend=backend))
    assert not again.log_probs.requires_grad
    assert again.entropy is None


@ON_BACKENDS
def test_a_gradient_of_the_entropy_alone(backend: str) -> None:
    model, batch = make(), Batch()
    unfused(model, batch)[1].sum().backward()
    expected = gradients(model)
    patch_lm_head(model)
    request = LogProbBatch(batch.layout, return_entropy=True, backend=backend)
    model(**batch.inputs, steppo=request).entropy.sum().backward()
    assert_same(gradients(model), expected, 1e-6)


@ON_BACKENDS
def test_on_policy_loss_of_old_log_probs_is_the_loss_without(backend: str) -> None:
    """What the no-grad pass returns is what the loss takes: nothing is shifted in between."""
    model, batch = make(), Batch()
    patch_lm_head(model)
    with torch.no_grad():
        old = model(**batch.inputs, steppo=LogProbBatch(batch.layout, backend=backend)).log_probs
    losses = []
    for values in (old, None):
        request = StepPOBatch(values, batch.advantages, batch.layout, backend=backend)
        losses.append(model(**batch.inputs, steppo=request))
        assert losses[-1].steppo.metrics.as_dict()["approx_kl"] == pytest.approx(0, abs=1e-7)
    torch.testing.assert_close(losses[0].loss, losses[1].loss)


@ON_BACKENDS
def test_what_is_given_per_token_is_at_its_token(backend: str) -> None:
    model, batch = make(), Batch()
    random = torch.Generator().manual_seed(3)
    values = old_and_ref(model, batch)
    weights = torch.rand(ROWS, LENGTH, generator=random, dtype=torch.float64)
    more = {
        "is_weights": weights,
        "step_weights": torch.rand(6, dtype=torch.float64),
        "normalizer": 5.0,
        "temperature": 0.7 + weights,
    }
    # Each token has an advantage of its own, and positions that are no action hold garbage.
    own = torch.randn(ROWS, LENGTH, generator=random, dtype=torch.float64)
    values["advantages"] = torch.where(batch.mask, own, torch.nan)
    expected_loss = unfused_loss(model, batch, values, **more)
    expected = gradients(model)
    patch_lm_head(model)
    out = model(**batch.inputs, steppo=fused_batch(batch, values, backend=backend, **more))
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), expected_loss, rtol=1e-6, atol=1e-6)
    assert_same(gradients(model), expected, 1e-6)


@ON_BACKENDS
def test_numbers_of_steps_stay_where_there_are_as_many_steps_as_tokens(backend: str) -> None:
    """Steps of one token, of which those that no state predicts are left empty."""
    model, batch = make(), Batch()
    ids = batch.inputs["input_ids"]
    scored = torch.ones(ids.shape, dtype=torch.bool)
    whole = StepLayout.from_mask(scored).per_token()
    scored[:, 0] = False
    layout = whole.keep(scored)
    assert layout.num_steps == ids.numel()
    generator = torch.Generator().manual_seed(5)
    numbers = torch.rand((3, ids.numel()), generator=generator, dtype=torch.float64)
    advantages, weights, moves = numbers
    logits = model(input_ids=ids).logits
    new = torch.zeros_like(ids, dtype=torch.float64)
    new[:, 1:] = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    old = (new + 0.1 * moves.view(ids.shape)).detach()
    config = StepPOConfig(clip_low=0.5, clip_high=0.5)
    options = {"config": config, "is_weights": weights}
    expected = steppo_loss(new, old, advantages, layout, **options, backend="reference").loss
    patch_lm_head(model)
    request = StepPOBatch(old, advantages, layout, **options, backend=backend)
    found = model(input_ids=ids, steppo=request).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@ON_BACKENDS
def test_a_mask_and_packed_rows(backend: str) -> None:
    """One packed row of [1, N] with positions of its own, its layout [N], is the padded batch."""
    model, batch = make("llama"), Batch()
    values = old_and_ref(model, batch)
    patch_lm_head(model)
    by_token = broadcast_to_tokens(batch.advantages, batch.layout, backend="reference")
    masked = fused_batch(batch, {**values, "advantages": by_token}, batch.mask, backend=backend)
    losses = [
        model(**batch.inputs, steppo=fused_batch(batch, values, backend=backend)).loss,
        model(**batch.inputs, steppo=masked).loss,
    ]

    real = batch.attention.bool()
    lengths = real.sum(1)
    rows = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    layout = StepLayout.from_mask(batch.mask[real], cu_seqlens=rows, backend="reference")
    same_row = torch.repeat_interleave(torch.arange(ROWS), lengths)
    causal = (same_row[:, None] == same_row) & torch.ones(
        len(same_row), len(same_row)
    ).tril().bool()
    packed = {
        name: value if name == "advantages" else value[real] for name, value in values.items()
    }
    out = model(
        input_ids=batch.ids[real][None],
        position_ids=torch.cat([torch.arange(int(n)) for n in lengths])[None],
        attention_mask=causal[None, None],
        steppo=fused_batch(batch, packed, layout, backend=backend),
    )
    for loss in (*losses[1:], out.loss):
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=1e-6)


@ON_BACKENDS
def test_left_padding_and_masked_garbage(backend: str) -> None:
    model, batch = make("llama"), Batch()
    values = old_and_ref(model, batch)
    patch_lm_head(model)
    expected = model(**batch.inputs, steppo=fused_batch(batch, values, backend=backend)).loss
    pad = 3

    def moved(tensor: Tensor, fill: float) -> Tensor:
        return nn.functional.pad(tensor, (pad, 0), value=fill)

    attention = moved(batch.attention, 0)
    values = {
        name: value
        if name == "advantages"
        else moved(value.where(batch.mask, torch.nan), torch.nan)
        for name, value in values.items()
    }
    layout = StepLayout.from_mask(moved(batch.mask, False), backend="reference")
    out = model(
        input_ids=moved(batch.ids, 0),
        attention_mask=attention,
        position_ids=(attention.cumsum(-1) - 1).clamp_min(0),
        steppo=fused_batch(batch, values, layout, backend=backend),
    )
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=1e-6)
    out.loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@ON_BACKENDS
def test_a_batch_without_actions(backend: str) -> None:
    model, batch = make(), Batch()
    patch_lm_head(model)
    nothing = torch.zeros_like(batch.mask)
    layout = StepLayout.from_mask(nothing, backend="reference")
    request = StepPOBatch(None, batch.advantages[:0], layout, backend=backend)
    out = model(**batch.inputs, steppo=request)
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert not any(grad.any() for grad in gradients(model).values())


@ON_BACKENDS
def test_frozen_head(backend: str) -> None:
    model, batch = make("qwen3"), Batch()
    values = old_and_ref(model, batch)
    model.lm_head.requires_grad_(False)
    unfused_loss(model, batch, values)
    expected = gradients(model)
    patch_lm_head(model)
    model(**batch.inputs, steppo=fused_batch(batch, values, backend=backend)).loss.backward()
    assert_same(gradients(model), expected, 1e-6)


@ON_BACKENDS
def test_autocast(backend: str) -> None:
    """As far from fp32 as the model with logits is."""
    model, batch = make("qwen2", torch.float32), Batch(torch.float32)
    values = old_and_ref(model, batch)
    exact_loss = unfused_loss(model, batch, values)
    exact = gradients(model)

    def error(loss: Tensor) -> tuple[float, float]:
        found = gradients(model)
        worst = max(float((found[name] - exact[name]).abs().max()) for name in exact)
        return abs(float(loss - exact_loss)), worst

    with torch.autocast("cpu", torch.bfloat16):
        allowed = error(unfused_loss(model, batch, values))
    patch_lm_head(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch.inputs, steppo=fused_batch(batch, values, backend=backend))
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    for got, bound in zip(error(out.loss.detach()), allowed, strict=True):
        assert got <= 1.5 * bound


@ON_BACKENDS
def test_bf16_weights(backend: str) -> None:
    model, batch = make("gemma2", torch.bfloat16), Batch(torch.float32)
    values = old_and_ref(model, batch)
    patch_lm_head(model)
    out = model(**batch.inputs, steppo=fused_batch(batch, values, backend=backend))
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert out.loss.isfinite()
    assert {grad.dtype for grad in gradients(model).values()} == {torch.bfloat16}


# What it costs


class _Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("mode", ["loss", "log_probs"])
def test_no_tensor_of_all_logits(mode: str) -> None:
    if why := choice.unavailable("cpu", torch.device("cpu")):
        pytest.skip(f"cpu: {why}")
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": 4000, "head_dim": 8})
    model = transformers.LlamaForCausalLM(config).train()
    patch_lm_head(model)
    ids = torch.randint(1, 4000, (4, 64))
    mask = torch.zeros(4, 64, dtype=torch.bool)
    mask[:, 10:30] = mask[:, 40:64] = True
    layout = StepLayout.from_mask(mask)
    chunk = 24
    with _Largest() as plain:
        model(ids)
    assert plain.numel == 4 * 64 * 4000
    with _Largest() as fused:
        if mode == "loss":
            request: Any = StepPOBatch(
                None,
                torch.ones(8),
                layout,
                chunk_tokens=chunk,
                config=StepPOConfig(entropy_coef=0.1),
            )
            model(ids, steppo=request).loss.backward()
        else:
            request = LogProbBatch(layout, chunk_tokens=chunk)
            model(ids, steppo=request).log_probs.sum().backward()
    assert fused.numel == chunk * 4000


def test_router_loss_of_a_mixture_of_experts() -> None:
    model, batch = make("mixtral"), Batch()
    expected = model(**batch.inputs, output_router_logits=True).aux_loss
    patch_lm_head(model)
    request = StepPOBatch(None, batch.advantages, batch.layout)
    alone = model(**batch.inputs, steppo=request)
    out = model(**batch.inputs, steppo=request, output_router_logits=True)
    assert alone.aux_loss is None
    torch.testing.assert_close(out.aux_loss, expected)
    torch.testing.assert_close(out.loss, alone.loss)
    assert len(out.router_logits) == 2
