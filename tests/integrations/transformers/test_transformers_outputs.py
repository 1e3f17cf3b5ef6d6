"""What a patched model returns: the fields of its own output, and those of this package."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

pytest.importorskip("transformers", reason="the demo's extra is not installed")

from tiny_models import LENGTH, ROWS, WIDTH, Batch, make

from steppo_kernels.integrations.transformers import (
    LogProbBatch,
    StepPOBatch,
    StepPOCausalLMOutput,
    patch_lm_head,
)

OURS = {"loss", "steppo", "log_probs", "entropy"}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_fields_are_the_models_own_under_its_own_names(family: str) -> None:
    model, batch = make(family), Batch()
    asked = {"use_cache": True, "output_hidden_states": True, "output_attentions": True}
    if family == "mixtral":
        asked["output_router_logits"] = True
    model.set_attn_implementation("eager")
    plain = model(**batch.inputs, **asked)
    patch_lm_head(model)
    out = model(**batch.inputs, **asked, steppo=StepPOBatch(None, batch.advantages, batch.layout))
    assert isinstance(out, StepPOCausalLMOutput)
    assert isinstance(out, type(plain))
    # A cache, whatever its name is; hidden states; attentions.
    assert len(plain) >= 4
    assert set(out) == (set(plain) - {"logits"}) | {"loss", "steppo"}
    for name in set(plain) - {"logits", "loss"}:
        assert type(out[name]) is type(plain[name])
        assert getattr(out, name) is out[name]
        if isinstance(plain[name], (tuple, torch.Tensor)):
            torch.testing.assert_close(out[name], plain[name])
    assert out.hidden_states[-1].shape == (ROWS, LENGTH, WIDTH)


def test_fields_that_the_model_left_empty_are_none() -> None:
    """Also the cache: nothing is kept for a generation unless it is asked for."""
    model, batch = make("mixtral"), Batch()
    own = vars(model(**batch.inputs)).keys()
    patch_lm_head(model)
    out = model(**batch.inputs, steppo=LogProbBatch(batch.layout))
    assert list(out) == ["log_probs"]
    for name in own | OURS - {"log_probs"}:
        assert getattr(out, name) is None
    with pytest.raises(AttributeError):
        _ = out.no_field


def _copies() -> dict[str, Callable[[Any], Any]]:
    def unflattened(out: Any) -> Any:
        return pytree.tree_unflatten(*pytree.tree_flatten(out))

    return {
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "pickle": lambda out: pickle.loads(pickle.dumps(out)),
        "pytree": unflattened,
        # As accelerate and DataParallel make an output anew.
        "mapping": lambda out: type(out)(dict(out)),
        "items": lambda out: type(out)((name, out[name]) for name in out),
    }


@pytest.mark.parametrize("made", _copies())
def test_copies_are_equal(made: str) -> None:
    model, batch = make("llama"), Batch()
    patch_lm_head(model)
    with torch.no_grad():
        request = LogProbBatch(batch.layout, return_entropy=True)
        out = model(**batch.inputs, steppo=request, output_hidden_states=True)
    again = _copies()[made](out)
    assert type(again) is type(out)
    assert vars(again).keys() == vars(out).keys()
    assert list(again) == list(out)
    for name in out:
        torch.testing.assert_close(again[name], out[name])
    assert again.logits is None


def test_what_is_no_output_of_transformers_is_refused() -> None:
    model, batch = make("llama"), Batch()
    inner = model.forward
    model.forward = lambda *args, **kwargs: dict(inner(*args, **kwargs))
    patch_lm_head(model)
    with pytest.raises(TypeError, match="its forward returned a dict, expected a ModelOutput"):
        model(**batch.inputs, steppo=LogProbBatch(batch.layout))
