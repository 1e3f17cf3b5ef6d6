"""Patched models over kept sets: what their own logits give, with the sets at the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo's extra is not installed")

from kept_cases import mask_of
from tiny_models import (
    CONFIG,
    LENGTH,
    ON_BACKENDS,
    ROWS,
    VOCAB,
    Batch,
    gradients,
    make,
    old_and_ref,
)

from steppo_kernels import TokenSupport, steppo_loss_from_logits, token_log_probs
from steppo_kernels.integrations.transformers import LogProbBatch, StepPOBatch, patch_lm_head
from steppo_kernels.layout.predictors import shifted_left

PROMPT = 4


def sets_of(batch: Batch, kind: str) -> torch.Tensor:
    """Sets that have the tokens, bool ``[B, T, V]``."""
    kept = mask_of(kind, ROWS * LENGTH, VOCAB).view(ROWS, LENGTH, VOCAB)
    ids = batch.inputs["input_ids"].unsqueeze(-1)
    own = torch.zeros_like(kept).scatter_(-1, ids, True)
    kept = kept | (own & kept.any(-1, keepdim=True))
    kept[~batch.mask] = False
    return kept


def moved(values: torch.Tensor) -> torch.Tensor:
    """What belongs to tokens at the places of the states before them."""
    return values.flatten(0, 1).roll(-1, 0).view(values.shape)


def expected(model: Any, batch: Batch, support: TokenSupport, values: Any) -> dict[str, Any]:
    """Log-probs, loss and gradients of the model's own logits."""
    logits = model(**batch.inputs).logits
    ids, layout = moved(batch.inputs["input_ids"]), shifted_left(batch.layout)
    log_probs, _ = token_log_probs(
        logits,
        ids,
        mask=layout.step_ids >= 0,
        support=support,
        return_entropy=True,
        backend="reference",
    )
    out = steppo_loss_from_logits(
        logits,
        ids,
        moved(values["old_log_probs"]),
        values["advantages"],
        layout,
        ref_log_probs=moved(values["ref_log_probs"]),
        config=CONFIG,
        support=support,
        backend="reference",
    )
    model.zero_grad()
    out.loss.backward()
    found = {"log_probs": log_probs.detach().flatten().roll(1).view(ROWS, LENGTH)}
    return found | {"loss": out.loss.detach()} | gradients(model)


@ON_BACKENDS
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "cohere"])
@pytest.mark.parametrize("kind", ["random", "some empty"])
@pytest.mark.parametrize("form", ["whole", "completions", "shifted"])
def test_log_probs_and_losses_are_those_of_the_logits(family, backend, kind, form):
    model, batch = make(family), Batch()
    if form == "completions":
        batch.mask[:, :PROMPT] = False
        from steppo_kernels import StepLayout

        batch.layout = StepLayout.from_mask(batch.mask, backend="reference")
        batch.advantages = batch.advantages[: batch.layout.num_steps]
    kept = sets_of(batch, kind)
    values = {**old_and_ref(model, batch), "advantages": batch.advantages}
    wanted = expected(model, batch, TokenSupport.from_mask(moved(kept)), values)
    options: dict[str, Any] = {"backend": backend, "support": TokenSupport.from_mask(kept)}
    layout = batch.layout
    if form == "completions":
        values = {k: v[:, PROMPT:] if v.dim() == 2 else v for k, v in values.items()}
        options["support"] = options["support"][:, PROMPT:]
        options["logits_to_keep"] = LENGTH - PROMPT
        layout = StepLayout.from_mask(batch.mask[:, PROMPT:], backend="reference")
    elif form == "shifted":
        values = {k: moved(v) if v.dim() == 2 else v for k, v in values.items()}
        layout = shifted_left(batch.layout)
        options |= {
            "shifted": True,
            "token_ids": moved(batch.inputs["input_ids"]),
            "support": TokenSupport.from_mask(moved(kept)),
        }
    patch_lm_head(model)
    model.zero_grad()
    with torch.no_grad():
        log_probs = model(**batch.inputs, steppo=LogProbBatch(layout, **options)).log_probs
    of_tokens = wanted["log_probs"]
    if form == "completions":
        of_tokens = of_tokens[:, PROMPT:]
    elif form == "shifted":
        of_tokens = moved(of_tokens)
    torch.testing.assert_close(log_probs, of_tokens, rtol=1e-10, atol=1e-10)
    request = StepPOBatch(layout=layout, config=CONFIG, **values, **options)
    loss = model(**batch.inputs, steppo=request).loss
    torch.testing.assert_close(loss.detach(), wanted["loss"], rtol=1e-10, atol=1e-10)
    loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-8, atol=1e-10)


def test_sets_of_another_shape_or_kind_are_refused():
    model, batch = make(), Batch()
    patch_lm_head(model)
    support = TokenSupport.from_mask(sets_of(batch, "random"))
    for bad, error in ((support[:, 1:], ValueError), (sets_of(batch, "random"), TypeError)):
        with pytest.raises(error, match="support: got "):
            model(**batch.inputs, steppo=LogProbBatch(batch.layout, support=bad))
