"""Small causal LMs of many families, a batch of steps, and the losses of their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the demo's extra is not installed")

import transformers
from transformers import PreTrainedModel

from steppo_kernels import StepLayout, StepPOConfig, steppo_loss
from steppo_kernels.backends import choice
from steppo_kernels.integrations.transformers import StepPOBatch

ROWS, LENGTH, VOCAB, WIDTH = 3, 14, 53, 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    # Logits of a few units: softcaps and scales must show.
    "initializer_range": 0.4,
}
# Architecture, whether the head is the embedding, and settings of its own.
FAMILIES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "qwen2": ("Qwen2", True, {}),
    "qwen3": ("Qwen3", False, {}),
    "llama": ("Llama", False, {}),
    "smollm2": ("Llama", True, {}),
    "mistral": ("Mistral", False, {"sliding_window": 6}),
    "gemma": ("Gemma", True, {}),
    "gemma2": ("Gemma2", True, {"final_logit_softcapping": 1.5, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3", True, {"final_logit_softcapping": 2.5, "sliding_window": 6}),
    "granite": ("Granite", False, {"logits_scaling": 3.0}),
    "cohere": ("Cohere", True, {"logit_scale": 0.3}),
    "phi": ("Phi", False, {}),
    "mixtral": (
        "Mixtral",
        False,
        {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    ),
}
CONFIG = StepPOConfig(clip_low=0.2, clip_high=0.3, kl_coef=0.1, entropy_coef=0.05)


def make(family: str = "qwen2", dtype: torch.dtype = torch.float64, **more: Any) -> PreTrainedModel:
    name, tied, extra = FAMILIES[family]
    config = getattr(transformers, f"{name}TextConfig", None) or getattr(
        transformers, f"{name}Config"
    )
    torch.manual_seed(0)
    settings = {
        **SIZES,
        "tie_word_embeddings": tied,
        "attn_implementation": "sdpa",
        **extra,
        **more,
    }
    model = getattr(transformers, f"{name}ForCausalLM", None) or getattr(
        transformers, f"{name}LMHeadModel"
    )
    model = model(config(**settings))
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return model.to(dtype).train()


class Batch:
    """Right-padded rows of two or three steps, with an old and a reference policy nearby."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> None:
        random = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, VOCAB, (ROWS, LENGTH), generator=random)
        self.attention = torch.ones(ROWS, LENGTH, dtype=torch.int64)
        self.attention[1, 11:] = 0
        self.ids[self.attention == 0] = 0
        self.mask = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
        for row, begin, end in ((0, 1, 4), (0, 6, 7), (0, 9, 14), (1, 3, 6), (1, 8, 11), (2, 2, 9)):
            self.mask[row, begin:end] = True
        self.layout = StepLayout.from_mask(self.mask, backend="reference")
        noise = torch.randn(2, ROWS, LENGTH, generator=random, dtype=torch.float64)
        self.old_noise, self.ref_noise = 0.4 * noise[0].to(dtype), 0.4 * noise[1].to(dtype)
        self.advantages = torch.randn(6, generator=random, dtype=torch.float64).to(dtype)
        self.inputs = {"input_ids": self.ids, "attention_mask": self.attention}


def unfused(model: Any, batch: Batch, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies at their tokens, from all logits."""
    if isinstance(temperature, Tensor):
        temperature = temperature[:, 1:, None]
    logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
    every = torch.log_softmax(logits / temperature, dim=-1)
    chosen = every.gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
    entropy = -(every.exp() * every).sum(-1)
    first = torch.zeros_like(chosen[:, :1])
    found = (torch.cat((first, values), dim=1) for values in (chosen, entropy))
    chosen, entropy = (torch.where(batch.mask, values, 0.0) for values in found)
    return chosen, entropy


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {name.removeprefix("module."): grad for name, grad in found.items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    scale = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        worst = float((got[name] - grad).abs().max())
        assert worst <= tolerance * scale, f"{name}: off by {worst:.1e} of {scale:.1e}"


def old_and_ref(model: Any, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        now = unfused(model, batch)[0]
    return {
        "old_log_probs": now + batch.old_noise,
        "ref_log_probs": now + batch.ref_noise,
        "advantages": batch.advantages,
    }


def unfused_loss(model: Any, batch: Batch, values: dict[str, Any], **more: Any) -> Tensor:
    log_probs, entropy = unfused(model, batch, more.pop("temperature", 1.0))
    options = {"layout": batch.layout, "config": CONFIG, **values, **more}
    out = steppo_loss(log_probs, entropy=entropy, backend="reference", **options)
    out.loss.backward()
    return out.loss.detach()


def fused_batch(
    batch: Batch, values: dict[str, Any], layout: Any = None, **more: Any
) -> StepPOBatch:
    layout = batch.layout if layout is None else layout
    return StepPOBatch(layout=layout, **{"config": CONFIG, **values, **more})


ON_BACKENDS = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=f"{name}: {why}"))
        for name in ("reference", "cpu")
        for why in (choice.unavailable(name, torch.device("cpu")),)
    ],
)
