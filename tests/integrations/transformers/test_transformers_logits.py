"""What is done to logits after the output head: it is measured, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny_models import (
    LENGTH,
    ON_BACKENDS,
    ROWS,
    SIZES,
    VOCAB,
    Batch,
    assert_same,
    gradients,
    make,
    unfused,
)
from torch import Tensor, nn

from steppo_kernels.integrations.transformers import LogProbBatch, StepPOBatch, patch_lm_head
from steppo_kernels.integrations.transformers.probe import LogitMap, measure, probe

Change = Callable[[Tensor], Any]


class _Changed(transformers.LlamaForCausalLM):
    """A subclass that does something to the logits of its parent."""

    change: Change

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = self.change(out.logits)
        return out


def _in_subclass(model: Any, change: Change) -> None:
    model.change = change


def _on_head(model: Any, change: Change) -> None:
    model.lm_head.register_forward_hook(lambda module, args, out: change(out))


def _on_model(model: Any, change: Change) -> None:
    def hook(module: Any, args: Any, out: Any) -> Any:
        if out.logits is not None:
            out.logits = change(out.logits)
        return out

    model.register_forward_hook(hook)


PLACES = {"subclass": _in_subclass, "hook on the head": _on_head, "hook on the model": _on_model}


def _model() -> Any:
    torch.manual_seed(0)
    model = _Changed(transformers.LlamaConfig(**SIZES)).double()
    model.change = lambda z: z
    return model


def _filled(index: Any, value: float) -> Change:
    def change(z: Tensor) -> Tensor:
        z = z.clone()
        z[index] = value
        return z

    return change


def _in_place(z: Tensor) -> Tensor:
    z[..., 40:] = torch.finfo(z.dtype).min
    return z


MEASURED: dict[str, Change] = {
    "scaled": lambda z: z * 1.5,
    "halved in place": lambda z: z.div_(2),
    "capped": lambda z: 3 * torch.tanh(z / 3),
    "scaled and capped": lambda z: 2 * torch.tanh(z * 0.7),
    "capped and scaled": lambda z: torch.tanh(z / 50) * 50 / 3,
    "rounded": lambda z: z.float(),
    "first token ids": lambda z: z[..., :40],
    "scaled first token ids": lambda z: 0.4 * z[..., :40],
}
REFUSED: dict[str, Change] = {
    "clamped": lambda z: z.clamp(max=10),
    "moved": lambda z: z + 0.2,
    "turned": lambda z: -z,
    "gone": lambda z: 0 * z,
    "other function": lambda z: z + z.square().sign() * 1e-3,
    "padding": _filled((..., slice(40, None)), -torch.inf),
    "padding in place": _in_place,
    "one token id": _filled((..., 7), 0.0),
    "one bias": lambda z: z + 1e-3 * (torch.arange(z.shape[-1]) == 11),
    "one scale": lambda z: z * (1 + 1e-3 * (torch.arange(z.shape[-1]) == 11)),
    "last token ids": lambda z: z[..., 3:],
    "order": lambda z: z.roll(1, -1),
    "reversed": lambda z: z.flip(-1),
    "one position": lambda z: z[:, -1:],
    "last position": _filled((slice(None), -1), 0.0),
    "all but the first position": _filled((slice(None), slice(1, None), slice(40, None)), -9e9),
    "later positions": _filled((slice(None), slice(5, None), slice(40, None)), -torch.inf),
    "later rows": _filled(slice(2, None), -torch.inf),
    "later positions in place": lambda z: z[:, 5:].fill_(0).sum() * 0 + z,
    "masked at none of few rows": lambda z: z.masked_fill(z > 1e6, 0.0),
    "by numpy": lambda z: torch.from_numpy(z.detach().numpy().copy()),
    "first row": _filled((0, ..., 3), 0.0),
    "all but the first row": _filled((slice(1, None), ..., 3), 0.0),
    "by position": lambda z: z + torch.zeros(ROWS, LENGTH, 1),
    "normalised": lambda z: z.log_softmax(-1),
    "by index": lambda z: z[torch.ones(ROWS, LENGTH, dtype=torch.bool)],
    "nothing": lambda z: None,
    "integers": lambda z: z.long(),
}


UNSEEN_IN_VALUES = {
    "later positions",
    "later rows",
    "later positions in place",
    "masked at none of few rows",
    "by numpy",
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", ["subclass", "hook on the head"])
@pytest.mark.parametrize("name", MEASURED)
def test_scale_softcap_and_width_are_measured(name: str, place: str, when: str) -> None:
    """Also of what comes after the first call, which is evaluated anew."""
    model, batch = _model(), Batch()
    batch.ids %= 40
    if when == "after":
        patch_lm_head(model)
        model(**batch.inputs, steppo=LogProbBatch(batch.layout))
    PLACES[place](model, MEASURED[name])
    expected = unfused(model, batch)
    (expected[0].sum() + expected[1].square().sum()).backward()
    expected_gradients = gradients(model)
    if when == "before":
        patch_lm_head(model)
    tolerance = 1e-5 if name == "rounded" else 1e-6
    for _ in range(2):
        out = model(**batch.inputs, steppo=LogProbBatch(batch.layout, return_entropy=True))
        for got, want in zip((out.log_probs, out.entropy), expected, strict=True):
            torch.testing.assert_close(got, want.double(), rtol=tolerance, atol=tolerance)
        (out.log_probs.sum() + out.entropy.square().sum()).backward()
        assert_same(gradients(model), expected_gradients, tolerance)


@pytest.mark.parametrize(("when", "no_grad"), [("before", False), ("after", True)])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        (name, place)
        for name in REFUSED
        for place in PLACES
        # A hook that returns None changes nothing. Behind the forward only values are seen.
        if (name, place) != ("nothing", "hook on the head")
        if place != "hook on the model" or name not in UNSEEN_IN_VALUES
    ],
)
def test_other_changes_are_refused(name: str, place: str, when: str, no_grad: bool) -> None:
    model, batch = _model(), Batch()
    change = REFUSED[name]
    request = LogProbBatch(batch.layout)
    if when == "before":
        PLACES[place](model, change)
        patch_lm_head(model)
    else:
        patch_lm_head(model)
        model(**batch.inputs, steppo=request)
        PLACES[place](model, change)
    with torch.set_grad_enabled(not no_grad):
        for _ in range(2):
            with pytest.raises((ValueError, RuntimeError, IndexError), match=r"^(model: |The )"):
                model(**batch.inputs, steppo=request)


@pytest.mark.parametrize("name", [name for name in MEASURED if name != "rounded"])
def test_hooks_on_the_model_are_refused(name: str) -> None:
    """They run when the loss is formed already, and the head's weights may be sharded again."""
    model, batch = _model(), Batch()
    patch_lm_head(model)
    request = StepPOBatch(None, batch.advantages, batch.layout)
    model(**batch.inputs, steppo=request)
    _on_model(model, MEASURED[name])
    with pytest.raises(ValueError, match="model: changes its logits after the output head"):
        model(**batch.inputs, steppo=request)


def test_hooks_that_look_are_left_alone() -> None:
    model, batch = _model(), Batch()
    seen: list[Any] = []

    def look(module: Any, args: Any, out: Tensor) -> None:
        with torch.no_grad():
            seen.append(
                (out[:, -1].argmax(-1), out.softmax(-1), out.to_sparse(), out.norm().item())
            )

    model.lm_head.register_forward_hook(look)
    model.register_forward_hook(lambda *args: seen.append(args[2].loss))
    patch_lm_head(model)
    model.register_forward_hook(lambda *args: seen.append(args[2].steppo.loss))
    out = model(**batch.inputs, steppo=StepPOBatch(None, batch.advantages, batch.layout))
    assert len(seen) == 3
    torch.testing.assert_close(seen[1], out.loss)
    assert seen[2] is out.steppo.loss
    assert out.logits is None


def test_an_output_that_a_hook_replaces_is_refused() -> None:
    model, batch = _model(), Batch()
    patch_lm_head(model)
    model.register_forward_hook(lambda *args: args[2].to_tuple())
    with pytest.raises(TypeError, match="a forward hook made a tuple of its output"):
        model(**batch.inputs, steppo=LogProbBatch(batch.layout))


@pytest.mark.parametrize("scale", [Tensor.mul, Tensor.mul_], ids=["anew", "in place"])
@pytest.mark.parametrize("place", PLACES)
def test_a_scale_that_is_learned_is_refused(place: str, scale: Any) -> None:
    """The fused loss would give it no gradient; one that is frozen is a number."""
    model, batch = _model(), Batch()
    model.gain = nn.Parameter(torch.ones((), dtype=torch.float64))
    PLACES[place](model, lambda z: scale(z, model.gain))
    patch_lm_head(model)
    request = LogProbBatch(batch.layout)
    with pytest.raises(ValueError, match="its logits depend on something else that learns"):
        model(**batch.inputs, steppo=request)
    with torch.no_grad():
        model(**batch.inputs, steppo=request)
    model.gain.requires_grad_(False)
    model(**batch.inputs, steppo=request).log_probs.sum().backward()


@pytest.mark.parametrize("place", ["subclass", "hook on the head"])
def test_logits_that_are_cut_off_are_refused(place: str) -> None:
    model, batch = _model(), Batch()
    PLACES[place](model, Tensor.detach)
    patch_lm_head(model)
    with pytest.raises(ValueError, match="are cut off from it after the output head"):
        model(**batch.inputs, steppo=LogProbBatch(batch.layout))


def test_a_hook_before_the_head_is_honoured_once() -> None:
    """The head may be called twice, where a scale is measured, and its hooks with it."""
    model, batch = make("granite"), Batch()
    model.lm_head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    expected = unfused(model, batch)[0]
    expected.sum().backward()
    expected_gradients = gradients(model)
    patch_lm_head(model)
    for _ in range(2):
        got = model(**batch.inputs, steppo=LogProbBatch(batch.layout)).log_probs
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        got.sum().backward()
        assert_same(gradients(model), expected_gradients, 1e-6)


@ON_BACKENDS
def test_garbage_at_other_tokens_does_not_matter_where_the_head_is_called_again(
    backend: str,
) -> None:
    model, batch = make("granite"), Batch()
    expected = unfused(model, batch)[0]
    behind = torch.ones_like(batch.mask)
    behind[:, :-1] = ~batch.mask[:, 1:]

    def hook(module: Any, args: Any) -> Any:
        return (args[0].masked_fill(behind[..., None], torch.nan),)

    model.lm_head.register_forward_pre_hook(hook)
    patch_lm_head(model)
    got = model(**batch.inputs, steppo=LogProbBatch(batch.layout, backend=backend)).log_probs
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


# The measurement itself


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 2, VOCAB, 4099])
def test_what_is_measured(width: int, dtype: torch.dtype) -> None:
    given = probe(width, torch.device("cpu"))
    accuracy = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)
    for softcap in (None, 0.7, 30.0, 5000.0):
        for scale in (1.0, 0.0625, 0.3, 3.0):
            made = LogitMap(softcap, scale).of(given).to(dtype)
            found = measure(made, width, torch.device("cpu"))
            assert found.scale == pytest.approx(scale, rel=accuracy)
            if scale == 1.0 and softcap is None:
                assert found == LogitMap()
            # A cap is above what half precision tells from a scale, or is found.
            assert (found.softcap is None) == (softcap is None) or softcap == 5000.0
            if softcap is not None and softcap < 5000.0:
                assert found.softcap == pytest.approx(softcap, rel=accuracy)


def test_no_two_columns_of_a_probe_are_the_same() -> None:
    given = probe(4099, torch.device("cpu")).view(4, -1)
    for row in given[1:]:
        assert len(row.unique()) == 4099
