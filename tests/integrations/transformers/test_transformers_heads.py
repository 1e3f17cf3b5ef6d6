"""Output heads that a patch refuses, and what it names as the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the demo's extra is not installed")

from tiny_models import VOCAB, WIDTH, Batch, make

from steppo_kernels.integrations.transformers import LogProbBatch, patch_lm_head

WAY_OUT = "steppo_loss_from_logits and token_log_probs on the logits"


class _Quantised(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.round())


class _PackedTensor(Tensor):
    """As libraries of quantisation keep weights in a plain `nn.Linear`."""


def _heads() -> dict[str, Any]:
    packed = nn.Linear(WIDTH, VOCAB, bias=False)
    packed.weight = nn.Parameter(torch.zeros(VOCAB, WIDTH).as_subclass(_PackedTensor))
    integers = nn.Linear(WIDTH, VOCAB, bias=False)
    integers.weight = nn.Parameter(torch.zeros(VOCAB, WIDTH, dtype=torch.int8), requires_grad=False)
    return {
        "subclass": _Quantised(WIDTH, VOCAB),
        "sequence": nn.Sequential(nn.Linear(WIDTH, VOCAB)),
        "none": None,
        "tensor subclass": packed,
        "integers": integers,
    }


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", _heads())
def test_heads_that_are_no_plain_matrix(kind: str, when: str) -> None:
    model, batch = make("llama"), Batch()
    if when == "after":
        patch_lm_head(model)
    model.lm_head = _heads()[kind]
    expected = rf"output head is a .*, expected a plain (nn\.Linear|tensor).* {WAY_OUT}"
    calls = {
        "before": lambda: patch_lm_head(model),
        "after": lambda: model(**batch.inputs, steppo=LogProbBatch(batch.layout)),
    }
    with pytest.raises(TypeError, match=expected):
        calls[when]()


def _cast_to_fp32(head: nn.Linear) -> None:
    """As trainers make a head of bf16 weights return fp32 logits."""
    inner = head.forward
    head.forward = lambda hidden: inner(hidden).float()  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "replace",
    [
        _cast_to_fp32,
        lambda head: setattr(head, "forward", nn.Linear(WIDTH, VOCAB).forward),
    ],
    ids=["fp32", "of another"],
)
def test_a_forward_that_was_replaced(replace: Any) -> None:
    expected = rf"the forward of its output head was replaced.* fp32.* Undo it; or .*{WAY_OUT}"
    model = make("llama")
    replace(model.lm_head)
    with pytest.raises(TypeError, match=expected):
        patch_lm_head(model)
    model, batch = make("llama", torch.float32), Batch()
    patch = patch_lm_head(model)
    replace(model.lm_head)
    with pytest.raises(TypeError, match=expected):
        model(**batch.inputs, steppo=LogProbBatch(batch.layout))
    assert model(**batch.inputs).logits.dtype == torch.float32
    with pytest.raises(RuntimeError, match="forward of the output head: was replaced"):
        patch.remove()


def test_a_plain_forward_that_was_set_is_no_replacement() -> None:
    """It is what accelerate leaves behind where its hooks are removed again."""
    model, batch = make("llama"), Batch()
    model.lm_head.forward = model.lm_head.forward
    patch_lm_head(model)
    request = LogProbBatch(batch.layout)
    with torch.no_grad():
        expected = model(**batch.inputs, steppo=request).log_probs
        model.lm_head.forward = model.lm_head.forward
        assert torch.equal(model(**batch.inputs, steppo=request).log_probs, expected)


def test_a_head_that_replaces_the_patched_one() -> None:
    """As after `resize_token_embeddings`."""
    model, batch = make("llama"), Batch()
    patch = patch_lm_head(model)
    old = model.lm_head
    model.resize_token_embeddings(VOCAB + 7)
    assert model.lm_head is not old
    with torch.no_grad():
        request = LogProbBatch(batch.layout)
        got = model(**batch.inputs, steppo=request).log_probs[batch.mask]
        every = model(**batch.inputs).logits.roll(1, 1).log_softmax(-1)
    assert every.shape[-1] == VOCAB + 7
    expected = every.gather(-1, batch.ids[..., None])[..., 0][batch.mask]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    patch.remove()
    for head in (old, model.lm_head):
        assert "forward" not in head.__dict__


def test_a_weight_that_a_parametrization_makes() -> None:
    model, batch = make("llama"), Batch()
    nn.utils.parametrizations.weight_norm(model.lm_head)
    patch_lm_head(model)
    request = LogProbBatch(batch.layout)
    model(**batch.inputs, steppo=request).log_probs.sum().backward()
    got = [p.grad.clone() for p in model.lm_head.parameters()]
    model.zero_grad()
    every = model(**batch.inputs).logits.roll(1, 1).log_softmax(-1)
    every.gather(-1, batch.ids[..., None])[..., 0][batch.mask].sum().backward()
    for grad, parameter in zip(got, model.lm_head.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-6, atol=1e-6)
