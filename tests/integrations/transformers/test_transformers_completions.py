"""Batches of prompt and completion in which everything but the ids is of the completion."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo's extra is not installed")

from tiny_models import CONFIG, LENGTH, ON_BACKENDS, ROWS, Batch, gradients, make, old_and_ref

from steppo_kernels import StepLayout
from steppo_kernels.integrations.transformers import LogProbBatch, StepPOBatch, patch_lm_head

PROMPT = 4
KEPT = LENGTH - PROMPT


class Completions(Batch):
    """The same batch, whose first columns are prompts; `kept` cuts tensors of tokens."""

    def __init__(self) -> None:
        super().__init__()
        # Where the prompts are. A step is cut off by one, so that it begins with the completion.
        self.mask[:, :PROMPT] = False
        assert bool(self.mask[2, PROMPT])
        self.layout = StepLayout.from_mask(self.mask, backend="reference")
        self.of_completions = StepLayout.from_mask(self.kept(self.mask), backend="reference")
        self.advantages = self.advantages[: self.layout.num_steps]

    @staticmethod
    def kept(values: torch.Tensor) -> torch.Tensor:
        return values[:, PROMPT:]


def evaluated(model: Any, batch: Completions, request: Any) -> tuple[Any, dict[str, Any]]:
    out = model(**batch.inputs, steppo=request)
    found = out.loss if out.loss is not None else (out.log_probs * 2 + out.entropy).sum()
    found.backward()
    return out, gradients(model)


@ON_BACKENDS
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere"])
@pytest.mark.parametrize("form", ["layout", "mask"])
@pytest.mark.parametrize("per_token", [False, True], ids=["steps", "tokens"])
def test_the_loss_is_that_of_tensors_padded_by_hand(family, form, per_token, backend):
    model, batch = make(family), Completions()
    values = old_and_ref(model, batch)
    random = torch.Generator().manual_seed(3)
    drawn = 0.5 + torch.rand(3, ROWS, LENGTH, generator=random, dtype=torch.float64)
    values |= {"temperature": drawn[0], "is_weights": drawn[1]}
    if per_token:
        values["advantages"] = drawn[2] - 1
    options = {
        "config": CONFIG,
        "backend": backend,
        "step_weights": drawn[0, 0, : len(batch.advantages)],
    }
    patch_lm_head(model)
    out, expected = evaluated(model, batch, StepPOBatch(layout=batch.layout, **values, **options))
    cut = {name: batch.kept(x) if x.dim() == 2 else x for name, x in values.items()}
    layout = batch.of_completions if form == "layout" else batch.kept(batch.mask)
    for shaped in (lambda x: x, lambda x: x.flatten() if x.dim() == 2 else x):
        request = StepPOBatch(
            layout=layout,
            logits_to_keep=KEPT,
            **{name: shaped(x) for name, x in cut.items()},
            **options,
        )
        got, found = evaluated(model, batch, request)
        assert torch.equal(got.loss, out.loss)
        assert torch.equal(got.steppo.step_log_ratio, out.steppo.step_log_ratio)
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            assert torch.equal(found[name], grad), name


@ON_BACKENDS
@pytest.mark.parametrize("ids", ["input_ids", "labels", "token_ids", "completion_ids"])
def test_log_probs_come_back_in_the_shape_of_completions(ids, backend):
    model, batch = make("gemma2"), Completions()
    temperature = 0.5 + torch.rand(ROWS, LENGTH, dtype=torch.float64)
    patch_lm_head(model)
    whole = LogProbBatch(
        batch.layout, temperature=temperature, return_entropy=True, backend=backend
    )
    out, expected = evaluated(model, batch, whole)
    given: dict[str, Any] = {}
    if ids == "token_ids":
        given["token_ids"] = batch.ids
    elif ids == "completion_ids":
        given["token_ids"] = batch.kept(batch.ids)
    elif ids == "labels":
        batch.inputs["labels"] = batch.kept(batch.ids).where(batch.kept(batch.mask), -100)
    cut = LogProbBatch(
        batch.of_completions,
        logits_to_keep=KEPT,
        temperature=batch.kept(temperature),
        return_entropy=True,
        backend=backend,
        **given,
    )
    got, found = evaluated(model, batch, cut)
    assert got.log_probs.shape == (ROWS, KEPT)
    assert torch.equal(got.log_probs, batch.kept(out.log_probs))
    assert torch.equal(got.entropy, batch.kept(out.entropy))
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name


def test_all_tokens_may_be_kept():
    model, batch = make(), Completions()
    patch_lm_head(model)
    whole = model(**batch.inputs, steppo=LogProbBatch(batch.layout)).log_probs
    kept = model(**batch.inputs, steppo=LogProbBatch(batch.layout, logits_to_keep=LENGTH))
    assert torch.equal(kept.log_probs, whole)


def test_steps_over_several_rows():
    """A trajectory in one step, whose rows do not follow each other once they are padded."""
    model, batch = make(), Completions()
    patch_lm_head(model)
    mask = torch.ones(ROWS, LENGTH)
    mask[:, :PROMPT] = 0
    mask[batch.attention == 0] = 0
    rows = ["a", "b", "a"], [0, 0, 1]
    whole = StepLayout.from_rows(mask, *rows, backend="reference").per_trajectory()
    cut = StepLayout.from_rows(batch.kept(mask), *rows, backend="reference").per_trajectory()
    advantages, old = torch.tensor([1.0, -1.0]), -torch.ones(ROWS, LENGTH)
    out, expected = evaluated(model, batch, StepPOBatch(old, advantages, whole))
    got, found = evaluated(
        model, batch, StepPOBatch(batch.kept(old), advantages, cut, logits_to_keep=KEPT)
    )
    assert torch.equal(got.steppo.step_log_ratio, out.steppo.step_log_ratio)
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name


def test_wrong_calls():
    model, batch = make(), Completions()
    patch_lm_head(model)
    cut, old = batch.of_completions, torch.zeros(ROWS, LENGTH, dtype=torch.float64)
    kept = {"layout": cut, "advantages": batch.advantages, "logits_to_keep": KEPT}
    unseen = batch.attention.clone()
    unseen[2, PROMPT - 1] = 0
    negative = batch.ids.clone()
    negative[2, PROMPT + 1] = -1
    for request, more, text in (
        (StepPOBatch(old, **kept), {}, r"old_log_probs: got shape \(3, 14\), expected .*\(3, 10\)"),
        (StepPOBatch(None, **{**kept, "layout": batch.layout}), {}, r"layout: got shape \(3, 14\)"),
        (StepPOBatch(None, **{**kept, "logits_to_keep": 99}), {}, "logits_to_keep: got 99"),
        (StepPOBatch(None, batch.advantages, cut), {}, "give the batch logits_to_keep=10"),
        (StepPOBatch(None, **kept, is_weights=old[:, :1]), {}, r"is_weights: got shape \(3, 1\)"),
        (StepPOBatch(None, **kept, temperature=old), {}, r"temperature: got shape \(3, 14\)"),
        (
            LogProbBatch(cut, logits_to_keep=KEPT, token_ids=batch.ids[:, 1:]),
            {},
            r"token_ids: got shape \(3, 13\)",
        ),
        (
            LogProbBatch(cut, logits_to_keep=KEPT),
            {"attention_mask": unseen},
            "layout: got an action token in row 2, column 0",
        ),
        (
            LogProbBatch(cut, logits_to_keep=KEPT),
            {"input_ids": negative},
            "input_ids: got -1 in row 2, column 5",
        ),
        (
            LogProbBatch(cut, logits_to_keep=KEPT, token_ids=batch.kept(negative)),
            {},
            "token_ids: got -1 in row 2, column 1",
        ),
    ):
        # The embedding takes no negative ids.
        given = {**batch.inputs, **more}
        if (given["input_ids"] < 0).any():
            ids = given["input_ids"]
            given |= {"input_ids": ids.clamp_min(0), "labels": ids}
            text = text.replace("input_ids", "labels")
        with pytest.raises(ValueError, match=text):
            model(**given, steppo=request)
    for value, error in ((0, ValueError), (True, TypeError), (2.0, TypeError)):
        with pytest.raises(error, match="logits_to_keep: got"):
            LogProbBatch(cut, logits_to_keep=value)
