"""Models that differ in what comes before, in or after their output head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo's extra is not installed")

import transformers
from tiny_models import (
    FAMILIES,
    ON_BACKENDS,
    SIZES,
    VOCAB,
    Batch,
    assert_same,
    fused_batch,
    gradients,
    make,
    old_and_ref,
    unfused,
    unfused_loss,
)

from steppo_kernels.integrations.transformers import LogProbBatch, patch_lm_head

MLA = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
# As `tiny_models.FAMILIES`.
OTHERS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "gpt2": ("GPT2", True, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "opt": ("OPT", True, {"ffn_dim": 16, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "phi3": ("Phi3", False, {}),
    "nemotron": ("Nemotron", False, {}),
    # Scales of logits, of hidden states before the head, of all that is in between.
    "cohere2": ("Cohere2", True, {"logit_scale": 0.3, "sliding_window": 6}),
    "hyperclovax": ("HyperCLOVAX", False, {"logits_scaling": 2.5}),
    "minicpm3": ("MiniCPM3", False, {**MLA, "dim_model_base": 4, "scale_emb": 2.0}),
    "granitemoe": (
        "GraniteMoe",
        False,
        {"num_local_experts": 3, "logits_scaling": 0.7, **EXPERTS},
    ),
    "falconh1": (
        "FalconH1",
        False,
        {
            "lm_head_multiplier": 0.3,
            "mamba_d_ssm": 16,
            "mamba_n_heads": 2,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
        },
    ),
    "recurrentgemma": (
        "RecurrentGemma",
        True,
        {
            "logits_soft_cap": 2.0,
            "lru_width": 16,
            "attention_window_size": 8,
            "attn_implementation": "eager",
        },
    ),
    # Routers.
    "olmoe": ("Olmoe", False, {"num_experts": 4, "num_key_value_heads": 2, **EXPERTS}),
    "qwen3moe": ("Qwen3Moe", False, {"num_experts": 3, "moe_intermediate_size": 8, **EXPERTS}),
    # The last of the vocabulary is cut off after the head.
    "inkling": (
        "Inkling",
        False,
        {
            "unpadded_vocab_size": VOCAB - 13,
            "num_key_value_heads": 2,
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "d_rel": 4,
            "rel_extent": 8,
            "mlp_layer_types": ["dense"] * 2,
            "logits_mup_width_multiplier": 2.0,
            "attn_implementation": "eager",
        },
    ),
}


def _why_not(name: str) -> str | None:
    """Return why the installed transformers has no such model to train, or None."""
    version = transformers.__version__
    if not any(hasattr(transformers, name + kind) for kind in ("ForCausalLM", "LMHeadModel")):
        return f"transformers {version} has no {name}"
    if name == "RecurrentGemma" and int(version.partition(".")[0]) < 5:
        return f"{name} of transformers {version} keeps its state, and its graph, between calls"
    return None


ON_OTHERS = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=pytest.mark.skipif(why is not None, reason=str(why)))
        for family, (name, *_) in OTHERS.items()
        for why in (_why_not(name),)
    ],
)


@pytest.fixture
def model(family: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(FAMILIES, family, OTHERS[family])
    return make(family)


@ON_OTHERS
@ON_BACKENDS
def test_loss_and_gradients_of_other_families(family: str, model: Any, backend: str) -> None:
    batch = Batch()
    if family == "inkling":
        batch.ids.clamp_(max=VOCAB - 14)
    values = old_and_ref(model, batch)
    expected_loss = unfused_loss(model, batch, values)
    expected = gradients(model)
    patch_lm_head(model)
    # The second call knows what the first one measured.
    for _ in range(2):
        out = model(**batch.inputs, steppo=fused_batch(batch, values, backend=backend))
        out.loss.backward()
        torch.testing.assert_close(out.loss.detach(), expected_loss, rtol=1e-6, atol=1e-6)
        assert_same(gradients(model), expected, 2e-6)


@pytest.mark.parametrize("family", ["inkling"])
@pytest.mark.skipif(_why_not("Inkling") is not None, reason=str(_why_not("Inkling")))
def test_token_ids_that_the_model_cuts_off_raise(family: str, model: Any) -> None:
    batch = Batch()
    batch.ids[batch.mask] = VOCAB - 1
    patch_lm_head(model)
    with pytest.raises(ValueError, match=f"got {VOCAB - 1}, expected ids from 0 to {VOCAB - 14}"):
        model(**batch.inputs, steppo=LogProbBatch(batch.layout))


def test_a_model_that_sees_images_is_one_of_text_without_them() -> None:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**SIZES),
        image_token_index=VOCAB - 1,
    )
    torch.manual_seed(0)
    model, batch = transformers.LlavaForConditionalGeneration(config).double(), Batch()
    batch.ids.clamp_(max=VOCAB - 2)
    with torch.no_grad():
        expected = unfused(model, batch)[0]
        patch_lm_head(model)
        got = model(**batch.inputs, steppo=LogProbBatch(batch.layout)).log_probs
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
