"""What patching a causal LM changes, restores and refuses."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the demo's extra is not installed")

import transformers
from tiny_models import (
    LENGTH,
    ON_BACKENDS,
    ROWS,
    SIZES,
    VOCAB,
    Batch,
    fused_batch,
    gradients,
    make,
    old_and_ref,
)

from steppo_kernels import StepLayout
from steppo_kernels.integrations.transformers import (
    LogProbBatch,
    StepPOBatch,
    patch_lm_head,
    patch_of,
)


def test_remove_restores() -> None:
    model, batch = make("gemma2"), Batch()
    batch_inputs = {**batch.inputs, "labels": batch.ids}
    before = model(**batch_inputs)
    state = dict(model.__dict__)
    head_state = dict(model.lm_head.__dict__)
    handle = patch_lm_head(model)
    during = model(**batch_inputs)
    model(**batch.inputs, steppo=LogProbBatch(batch.layout))
    handle.remove()
    handle.remove()
    after = model(**batch_inputs)
    for out in (during, after):
        assert type(out) is type(before)
        assert torch.equal(out.logits, before.logits)
        assert torch.equal(out.loss, before.loss)
    assert model.__dict__ == state
    assert model.lm_head.__dict__ == head_state
    assert "forward" not in model.__dict__


def test_after_an_error_in_a_call_plain_calls_are_plain() -> None:
    model, batch = make(), Batch()
    patch_lm_head(model)
    with pytest.raises(ValueError, match="advantages"):
        model(**batch.inputs, steppo=StepPOBatch(None, batch.advantages[:2], batch.layout))
    assert model(**batch.inputs).logits.shape == (ROWS, LENGTH, VOCAB)


def test_a_forward_set_before_comes_back() -> None:
    model, batch = make(), Batch()
    calls = []
    inner = model.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = own
    with patch_lm_head(model):
        model(**batch.inputs, steppo=LogProbBatch(batch.layout))
    assert calls == [1]
    assert model.forward is own


def test_patching_twice() -> None:
    model = make()
    assert patch_of(model) is None
    with patch_lm_head(model) as patch:
        with pytest.raises(RuntimeError, match=r"patched already.* patch_of\(model\)"):
            patch_lm_head(model)
        assert patch_of(model) is patch
        for wrapped in (nn.DataParallel(model), torch.compile(model)):
            assert patch_of(wrapped) is patch
    assert patch_of(model) is None
    patch_lm_head(model).remove()


def test_a_pickle_is_refused() -> None:
    """As what came back would say that it is patched, and would not be."""
    model = make()
    handle = patch_lm_head(model)
    with pytest.raises(TypeError, match="a patched model cannot be pickled"):
        torch.save(model, io.BytesIO())
    torch.save(model.state_dict(), io.BytesIO())
    handle.remove()
    torch.save(model, io.BytesIO())


def test_a_deep_copy_is_patched_on_its_own() -> None:
    model, batch = make(), Batch()
    handle = patch_lm_head(model)
    twin = copy.deepcopy(model)
    assert patch_of(twin).model is twin
    with pytest.raises(RuntimeError, match="is patched already"):
        patch_lm_head(twin)
    with torch.no_grad():
        twin.model.embed_tokens.weight.zero_()
        request = LogProbBatch(batch.layout)
        of_twin = twin(**batch.inputs, steppo=request).log_probs
        of_model = model(**batch.inputs, steppo=request).log_probs
    assert not torch.allclose(of_twin, of_model)
    torch.testing.assert_close(
        of_twin[batch.mask], torch.full_like(of_twin[batch.mask], 1 / VOCAB).log()
    )
    handle.remove()
    twin(**batch.inputs, steppo=request)
    patch_of(twin).remove()
    assert "forward" not in twin.__dict__


def test_generate_and_signature() -> None:
    model, batch = make("qwen2", torch.float32), Batch()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.eval().generate(batch.ids[:1, :5], **options)
    before = inspect.signature(model.forward)
    patch_lm_head(model)
    assert torch.equal(model.generate(batch.ids[:1, :5], **options), expected)
    after = dict(inspect.signature(model.forward).parameters)
    assert after.pop("steppo").default is None
    assert after == dict(before.parameters)


@ON_BACKENDS
def test_tokens_by_position_and_embeddings(backend: str) -> None:
    model, batch = make(), Batch()
    patch_lm_head(model)
    request = LogProbBatch(batch.layout, backend=backend)
    with torch.no_grad():
        expected = model(**batch.inputs, steppo=request).log_probs
        by_position = model(batch.ids, batch.attention, steppo=request).log_probs
        embeddings = model.get_input_embeddings()(batch.ids)
        request = LogProbBatch(batch.layout, token_ids=batch.ids, backend=backend)
        out = model(inputs_embeds=embeddings, attention_mask=batch.attention, steppo=request)
    assert torch.equal(by_position, expected)
    torch.testing.assert_close(out.log_probs, expected)
    with pytest.raises(ValueError, match="token_ids: got None"):
        model(inputs_embeds=embeddings, steppo=LogProbBatch(batch.layout))


class _HandsOn(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_tokens_by_position_where_the_signature_does_not_name_them() -> None:
    """A subclass, and a forward that was set, hand their arguments on."""
    batch = Batch()
    for kind in (_HandsOn, transformers.LlamaForCausalLM):
        model = kind(transformers.LlamaConfig(**SIZES))
        if kind is not _HandsOn:
            inner = model.forward
            model.forward = lambda *args, inner=inner, **kwargs: inner(*args, **kwargs)
        patch_lm_head(model)
        request = LogProbBatch(batch.layout)
        expected = model(**batch.inputs, steppo=request).log_probs
        labels = batch.ids.where(batch.mask, -100)
        assert torch.equal(model(batch.ids, batch.attention, steppo=request).log_probs, expected)
        position = [*inspect.signature(transformers.LlamaForCausalLM.forward).parameters]
        by_position = [None] * (position.index("labels") - 3)
        got = model(batch.ids, batch.attention, *by_position, labels, steppo=request)
        assert torch.equal(got.log_probs, expected)


def test_a_patched_model_is_saved_as_the_model(tmp_path: Any) -> None:
    model, batch = make("llama"), Batch()
    names, expected = list(model.state_dict()), model(**batch.inputs).logits
    patch_lm_head(model)
    model(**batch.inputs, steppo=LogProbBatch(batch.layout))
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is transformers.LlamaForCausalLM
    assert patch_of(again) is None
    torch.testing.assert_close(
        again.double()(**batch.inputs).logits, expected, rtol=1e-5, atol=1e-5
    )


@ON_BACKENDS
@pytest.mark.parametrize("mode", ["loss", "log_probs"])
def test_labels_are_the_tokens(mode: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As training code has them, -100 where nothing is learned; nothing else is made of them."""
    model, batch = make(), Batch()
    values = old_and_ref(model, batch)
    patch_lm_head(model)
    monkeypatch.setattr(model, "_loss_function", None, raising=False)
    embeddings = model.get_input_embeddings()(batch.ids).detach()
    attention = batch.attention
    labels = batch.ids.where(batch.mask, -100)
    other = (batch.ids + 1) % VOCAB

    def run(*args: Any, token_ids: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        if mode == "loss":
            request: Any = fused_batch(batch, values, token_ids=token_ids, backend=backend)
            out = model(*args, steppo=request, **kwargs).loss
        else:
            request = LogProbBatch(batch.layout, token_ids=token_ids, backend=backend)
            out = model(*args, steppo=request, **kwargs).log_probs
        out.square().sum().backward()
        return {"out": out.detach(), "head": gradients(model)["model.embed_tokens.weight"]}

    of_ids = run(**batch.inputs)
    of_embeddings = run(inputs_embeds=embeddings, attention_mask=attention, token_ids=batch.ids)
    position = list(inspect.signature(type(model).forward).parameters).index("labels") - 1
    by_position = (batch.ids, attention, *[None] * (position - 2), labels)
    for got, expected in (
        (run(**batch.inputs, labels=labels), of_ids),
        (run(*by_position), of_ids),
        (run(inputs_embeds=embeddings, attention_mask=attention, labels=labels), of_embeddings),
        (run(**batch.inputs, labels=other, token_ids=batch.ids), of_ids),
    ):
        for name, value in expected.items():
            assert torch.equal(got[name], value)
    torch.testing.assert_close(of_embeddings["out"], of_ids["out"])
    assert not torch.allclose(run(**batch.inputs, labels=other)["out"], of_ids["out"])


# What it refuses


def test_bad_models() -> None:
    for model, error, text in (
        (nn.Linear(2, 2), TypeError, "model: got Linear"),
        (nn.DataParallel(make()), TypeError, "model: got DataParallel"),
        (
            transformers.BertForMaskedLM(
                transformers.BertConfig(
                    vocab_size=9,
                    hidden_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=1,
                    intermediate_size=8,
                )
            ),
            TypeError,
            "expected a causal LM",
        ),
        (
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(
                    vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
                )
            ),
            TypeError,
            "expected a causal LM",
        ),
    ):
        with pytest.raises(error, match=text):
            patch_lm_head(model)


class _Headless(transformers.LlamaForCausalLM):
    calls = 0

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        hidden = self.model(input_ids).last_hidden_state
        for _ in range(self.calls):
            logits = self.lm_head(hidden)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits if self.calls else None)


@pytest.mark.parametrize(("calls", "text"), [(0, "did not call its"), (2, "called its .* again")])
def test_the_head_is_called_once(calls: int, text: str) -> None:
    batch = Batch()
    model = _Headless(transformers.LlamaConfig(**SIZES))
    model.calls = calls
    patch_lm_head(model)
    with pytest.raises(RuntimeError, match=text):
        model(batch.ids, steppo=LogProbBatch(batch.layout))


def test_bad_arguments() -> None:
    model, batch = make(), Batch()
    patch_lm_head(model)
    request = LogProbBatch(batch.layout)
    first = batch.mask.clone()
    first[2, 0] = True
    padded = batch.mask.clone()
    padded[1, 12] = True
    for arguments, error, text in (
        ({"steppo": batch.layout}, TypeError, "steppo: got StepLayout"),
        (
            {"steppo": request, "labels": batch.ids.where(batch.attention > 0, -100)[:, 1:]},
            ValueError,
            "labels: got shape",
        ),
        (
            {"steppo": request, "labels": torch.full_like(batch.ids, -100)},
            ValueError,
            "labels: got -100 in row 0, column 1, expected token ids at action tokens",
        ),
        ({"steppo": request, "labels": batch.ids.double()}, TypeError, "labels: got"),
        ({"steppo": request, "labels": batch.ids.tolist()}, TypeError, "labels: got list"),
        ({"steppo": request, "logits_to_keep": 3}, ValueError, "logits_to_keep: got it"),
        ({"steppo": request, "return_dict": False}, ValueError, "return_dict: got False"),
        ({"steppo": LogProbBatch(first)}, ValueError, "row 2, column 0"),
        ({"steppo": LogProbBatch(padded)}, ValueError, "row 1, column 12"),
        ({"steppo": LogProbBatch(batch.mask[:, 1:])}, ValueError, "layout: got shape"),
        ({"steppo": LogProbBatch(batch.mask.t())}, ValueError, "layout: got shape"),
        (
            {"steppo": LogProbBatch(batch.layout, token_ids=batch.ids.t())},
            ValueError,
            "token_ids: got shape",
        ),
        (
            {"steppo": StepPOBatch(batch.old_noise.t(), batch.advantages, batch.layout)},
            ValueError,
            "old_log_probs: got shape",
        ),
        ({"steppo": LogProbBatch("mask")}, TypeError, "layout: got str"),
        ({"steppo": LogProbBatch(0.5 * batch.mask)}, ValueError, "layout: got the value 0.5"),
        (
            {"steppo": LogProbBatch(batch.layout, token_ids=batch.ids.double())},
            TypeError,
            "token_ids: got",
        ),
        (
            {"steppo": StepPOBatch(batch.old_noise[:, 1:], batch.advantages, batch.layout)},
            ValueError,
            "old_log_probs: got shape",
        ),
    ):
        with pytest.raises(error, match=text):
            model(**batch.inputs, **arguments)


def test_an_action_at_the_start_of_a_row_raises() -> None:
    """No state is before the first token of a row, be it of the layout or of the batch."""
    model, batch = make(), Batch()
    patch_lm_head(model)
    mask = torch.zeros(ROWS * LENGTH, dtype=torch.bool)
    mask[LENGTH : LENGTH + 2] = True
    rows = torch.tensor([0, LENGTH, ROWS * LENGTH, ROWS * LENGTH])
    packed = StepLayout.from_mask(mask, cu_seqlens=rows, backend="reference")
    with pytest.raises(ValueError, match=f"row 0, column {LENGTH}"):
        model(batch.ids.view(1, -1), steppo=LogProbBatch(packed))
    with pytest.raises(ValueError, match="row 1, column 0"):
        model(batch.ids, steppo=LogProbBatch(mask))
