"""Tensors that a caller can make and few expect: read as torch reads them, or refused by name."""

from __future__ import annotations

import fractions
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    broadcast_to_tokens,
    linear_steppo_loss,
    linear_token_log_probs,
    step_gae,
    step_value_loss,
    steppo_loss,
    steppo_loss_from_logits,
    token_log_probs,
)
from steppo_kernels.backends import choice

_MASK = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 1, 0, 0]], dtype=torch.bool)
_LAYOUT = StepLayout.from_mask(_MASK, backend="reference")
_TOKENS = torch.linspace(-1.0, -0.1, 12).reshape(2, 6)
_STEPS = torch.linspace(-1.0, 1.0, 4)
_IDS = torch.arange(12).reshape(2, 6) % 5
_LOGITS = torch.linspace(-2.0, 2.0, 60).reshape(2, 6, 5).sin()
_HIDDEN = torch.linspace(-1.0, 1.0, 36).reshape(2, 6, 3).cos()
_WEIGHT = torch.linspace(-1.0, 1.0, 15).reshape(5, 3).sin()
_BIAS = torch.linspace(-1.0, 1.0, 5)
_CONFIG = StepPOConfig(clip_low=0.2, clip_high=0.2, kl_coef=0.1, entropy_coef=0.1)
_PLAIN = StepPOConfig(clip_low=0.2, clip_high=0.2, kl_coef=0.1)

_LOSS = {"old_log_probs": _TOKENS * 1.1, "ref_log_probs": _TOKENS * 0.9, "advantages": _STEPS}
_ON_STEPS = {"is_weights": _STEPS + 2, "step_weights": _STEPS + 3}

# Each public function with its tensors: the arguments, and those that stay as they are.
_FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, torch.Tensor], dict[str, Any]]] = {
    "steppo_loss": (
        steppo_loss,
        {"log_probs": _TOKENS, "entropy": -_TOKENS, **_LOSS, **_ON_STEPS},
        {"layout": _LAYOUT, "config": _CONFIG},
    ),
    "steppo_loss, mask": (
        steppo_loss,
        {"log_probs": _TOKENS, "layout": _MASK, **_LOSS, "advantages": _TOKENS},
        {"config": _PLAIN},
    ),
    "steppo_loss, numbers": (
        steppo_loss,
        {"normalizer": torch.tensor(3.0), "ratio_center": torch.tensor(0.1)},
        {
            "log_probs": _TOKENS,
            "layout": _LAYOUT,
            **_LOSS,
            "config": StepPOConfig(ratio="centered"),
        },
    ),
    "steppo_loss_from_logits": (
        steppo_loss_from_logits,
        {"logits": _LOGITS, "token_ids": _IDS, "temperature": -_TOKENS, **_LOSS},
        {"layout": _LAYOUT, "config": _CONFIG},
    ),
    "linear_steppo_loss": (
        linear_steppo_loss,
        {
            "hidden": _HIDDEN,
            "weight": _WEIGHT,
            "bias": _BIAS,
            "token_ids": _IDS,
            "temperature": -_TOKENS,
            **_LOSS,
        },
        {"layout": _LAYOUT, "config": _CONFIG},
    ),
    "token_log_probs": (
        token_log_probs,
        {"logits": _LOGITS, "token_ids": _IDS, "mask": _MASK, "temperature": -_TOKENS},
        {},
    ),
    "linear_token_log_probs": (
        linear_token_log_probs,
        {"hidden": _HIDDEN, "weight": _WEIGHT, "bias": _BIAS, "token_ids": _IDS, "mask": _MASK},
        {},
    ),
    "step_value_loss": (
        step_value_loss,
        {
            "values": _TOKENS,
            "returns": _STEPS,
            "old_values": _TOKENS * 0.5,
            "step_weights": _ON_STEPS["step_weights"],
        },
        {"layout": _LAYOUT},
    ),
    "step_gae": (
        step_gae,
        {"rewards": _TOKENS, "values": _TOKENS * 2, "bootstrap_values": _STEPS[:2]},
        {"layout": _LAYOUT},
    ),
    "broadcast_to_tokens": (broadcast_to_tokens, {"per_step": _STEPS}, {"layout": _LAYOUT}),
    "from_mask": (StepLayout.from_mask, {"mask": _MASK, "boundaries": _MASK.roll(1, 1)}, {}),
    "from_mask, packed": (
        StepLayout.from_mask,
        {"cu_seqlens": torch.tensor([0, 4, 12])},
        {"mask": _MASK.view(-1)},
    ),
    "from_step_ids": (
        StepLayout.from_step_ids,
        {"step_ids": _MASK.cumsum(1).where(_MASK, -1)},
        {},
    ),
    "from_rows": (
        StepLayout.from_rows,
        {
            "mask": _MASK,
            "trajectory_ids": torch.tensor([3, 3]),
            "step_indices": torch.tensor([1, 0]),
            "valid": torch.tensor([True, True]),
        },
        {},
    ),
    "from_markers": (
        StepLayout.from_markers,
        {
            "token_ids": _IDS,
            "start": torch.tensor([0, 1]),
            "end": torch.tensor([3]),
            "stop": torch.tensor([4]),
            "valid": _MASK | (_IDS < 3),
        },
        {},
    ),
}
_PLACES = [(name, argument) for name, (_, given, _) in _FUNCTIONS.items() for argument in given]


class _Subclass(torch.Tensor):
    """A tensor in all but its name."""


class _Other(torch.Tensor):
    """A tensor whose values are not those of its memory."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def _misaligned(base: torch.Tensor) -> torch.Tensor:
    memory = bytearray(1 + base.numel() * base.element_size())
    made = torch.frombuffer(memory, dtype=base.dtype, count=base.numel(), offset=1)
    return made.copy_(base.flatten()).reshape(base.shape)


def _of_inference_mode(base: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return base.clone()


def _freed(base: torch.Tensor) -> torch.Tensor:
    made = base.clone()
    made.untyped_storage().resize_(0)
    return made


# Forms that torch reads as the same values.
_SAME: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "the negative bit": lambda x: None if x.dtype == torch.bool else torch._neg_view(-x),
    "an imaginary part": lambda x: (
        torch.complex(x, -x).conj().imag if x.is_floating_point() else None
    ),
    "a subclass": lambda x: x.clone().as_subclass(_Subclass),
    "a Parameter": lambda x: torch.nn.Parameter(x.clone(), requires_grad=False),
    "inference mode": _of_inference_mode,
    "an odd address": lambda x: None if x.dtype == torch.bool else _misaligned(x),
    "other strides": lambda x: torch.stack((x, x), -1)[..., 0] if x.dim() else x.clone(),
    "bytes of 255": lambda x: (x.byte() * 255).view(torch.bool) if x.dtype == torch.bool else None,
    "bytes of 2": lambda x: (x.byte() * 2).view(torch.bool) if x.dtype == torch.bool else None,
}

# Forms that no kernel reads.
_FOREIGN: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "sparse": lambda x: x.to_sparse() if x.dim() else None,
    "nested": lambda x: torch.nested.nested_tensor(list(x)) if x.dim() > 1 else None,
    "jagged": lambda x: (
        torch.nested.nested_tensor(list(x), layout=torch.jagged) if x.dim() > 1 else None
    ),
    "mkldnn": lambda x: x.to_mkldnn() if x.dtype == torch.float32 and x.dim() else None,
    "quantised": lambda x: (
        torch.quantize_per_tensor(x, 0.1, 0, torch.quint8) if x.is_floating_point() else None
    ),
    "complex": lambda x: x + 0j,
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "uint64": lambda x: x.to(torch.uint64),
    "meta": lambda x: x.to("meta"),
    "fake": lambda x: FakeTensorMode().from_tensor(x),
    "freed": _freed,
    "another reading": lambda x: x.clone().as_subclass(_Other),
}


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if why := choice.unavailable(request.param, torch.device("cpu")):
        pytest.skip(why)
    return request.param


def outcome(name: str, backend: str, **changed: Any) -> list[torch.Tensor]:
    """The results of a function, and the gradients of those of its arguments that want one."""
    function, given, rest = _FUNCTIONS[name]
    found = function(**{**given, **rest, **changed}, backend=backend)
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, StepLayout):
        return list(found.tensors().values())
    loss = getattr(found, "loss", None)
    return [found.advantages, found.returns] if loss is None else [loss, found.metrics.values]


@pytest.mark.parametrize(("name", "argument"), _PLACES, ids=lambda value: str(value))
def test_values_are_read_as_torch_reads_them(backend, name, argument):
    wanted = outcome(name, backend)
    base = _FUNCTIONS[name][1][argument]
    for form, make in _SAME.items():
        made = make(base)
        if made is not None:
            found = outcome(name, backend, **{argument: made})
            for one, two in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7, msg=form)


@pytest.mark.parametrize(("name", "argument"), _PLACES, ids=lambda value: str(value))
@pytest.mark.filterwarnings("ignore:.*(sparse|nested|quant|mkldnn).*")
def test_what_no_kernel_reads_is_refused_by_name(backend, name, argument):
    base = _FUNCTIONS[name][1][argument]
    for form, make in _FOREIGN.items():
        made = make(base)
        if made is None:
            continue
        with pytest.raises((TypeError, ValueError), match=f"^{argument}: got .*expected") as caught:
            outcome(name, backend, **{argument: made})
        assert "aten" not in str(caught.value), form


def test_gradients_reach_tensors_of_every_form(backend):
    """Through the negative bit, a subclass, another stride."""
    wanted = _TOKENS.clone().requires_grad_()
    steppo_loss(wanted, _TOKENS * 1.1, _STEPS, _LAYOUT, backend=backend).loss.backward()
    for form in ("the negative bit", "a subclass", "other strides", "an imaginary part"):
        base = _TOKENS.clone().requires_grad_()
        made = _SAME[form](base)
        steppo_loss(made, _TOKENS * 1.1, _STEPS, _LAYOUT, backend=backend).loss.backward()
        torch.testing.assert_close(base.grad, wanted.grad, msg=form)


def test_inference_tensors_beside_those_that_learn(backend):
    """What autograd saves is a copy."""
    ids, mask, weight = map(_of_inference_mode, (_IDS, _MASK, _WEIGHT))
    logits = _LOGITS.clone().requires_grad_()
    token_log_probs(logits, ids, mask=mask, backend=backend).sum().backward()
    hidden = _HIDDEN.clone().requires_grad_()
    linear_token_log_probs(hidden, weight, ids, mask=mask, backend=backend).sum().backward()
    log_probs = _TOKENS.clone().requires_grad_()
    steppo_loss(log_probs, None, log_probs.detach(), mask, backend=backend).loss.backward()
    per_step = _STEPS.clone().requires_grad_()
    broadcast_to_tokens(per_step, _LAYOUT, backend=backend).sum().backward()
    for value in (logits, hidden, log_probs, per_step):
        assert value.grad is not None


_PER_TOKEN = [
    (name, argument)
    for name, argument in _PLACES
    if argument
    in {
        "log_probs",
        "old_log_probs",
        "ref_log_probs",
        "entropy",
        "token_ids",
        "values",
        "old_values",
        "rewards",
        "temperature",
    }
    and name != "from_markers"
] + [("steppo_loss, mask", "advantages"), ("token_log_probs", "mask")]


@pytest.mark.parametrize(("name", "argument"), _PER_TOKEN, ids=lambda value: str(value))
def test_another_order_of_as_many_tokens_is_refused(backend, name, argument):
    """``[T, B]`` for ``[B, T]``, and every other view but those that keep the order."""
    base = _FUNCTIONS[name][1][argument]
    wanted = outcome(name, backend)
    for made in (base.view(-1), base[None], base[..., None], base[:, None], base.view(1, 12)[0]):
        found = outcome(name, backend, **{argument: made})
        assert torch.equal(found[0].reshape(-1), wanted[0].reshape(-1))
    for made in (base.t(), base.t().contiguous(), base.view(3, 4), base.view(2, 3, 2)):
        with pytest.raises(ValueError, match=f"^{argument}: got shape .*, expected"):
            outcome(name, backend, **{argument: made})


@pytest.mark.parametrize("name", ["steppo_loss_from_logits", "linear_steppo_loss"])
def test_another_order_of_rows_is_refused(backend, name):
    argument = "logits" if name == "steppo_loss_from_logits" else "hidden"
    base = _FUNCTIONS[name][1][argument]
    wanted = outcome(name, backend)
    for made in (base.view(12, -1), base[None], base[:, None]):
        assert torch.equal(outcome(name, backend, **{argument: made})[0], wanted[0])
    for made in (base.transpose(0, 1), base.view(3, 4, -1), base[..., None]):
        with pytest.raises(ValueError, match=f"^{argument}: got shape .*, expected"):
            outcome(name, backend, **{argument: made})


def test_flat_logits_of_tokens_in_rows(backend):
    """The token shape is then that of the ids."""
    wanted = token_log_probs(_LOGITS, _IDS, mask=_MASK, temperature=-_TOKENS, backend=backend)
    flat = token_log_probs(
        _LOGITS.view(12, 5), _IDS, mask=_MASK, temperature=-_TOKENS, backend=backend
    )
    assert torch.equal(flat, wanted)
    wanted = linear_token_log_probs(_HIDDEN, _WEIGHT, _IDS, temperature=-_TOKENS, backend=backend)
    flat = linear_token_log_probs(
        _HIDDEN.view(12, 3), _WEIGHT, _IDS, temperature=-_TOKENS, backend=backend
    )
    assert torch.equal(flat, wanted)
    with pytest.raises(ValueError, match=r"^mask: got shape \(6, 2\)"):
        token_log_probs(_LOGITS.view(12, 5), _IDS, mask=_MASK.t(), backend=backend)


def test_as_many_steps_as_tokens(backend):
    """A vector is per step, as everywhere; with a dimension of size 1 more it is per token."""
    # Two rows of one trajectory, given out of order: step s is not token s.
    layout = StepLayout.from_rows(torch.ones(2, 2), [0, 0], [1, 0]).per_trajectory().per_token()
    assert layout.token_index.tolist() == [2, 3, 0, 1]
    numbers = torch.tensor([1.0, 2.0, 3.0, 4.0])
    log_probs = torch.zeros(2, 2, requires_grad=True)
    config = StepPOConfig(reduction="sum")
    for given, wanted in (
        (numbers, [[-3.0, -4.0], [-1.0, -2.0]]),
        (numbers.view(2, 2), [[-1.0, -2.0], [-3.0, -4.0]]),
        (numbers.view(2, 1, 2), [[-1.0, -2.0], [-3.0, -4.0]]),
    ):
        for arguments in (
            {"advantages": given},
            {"advantages": torch.ones(4), "is_weights": given},
        ):
            log_probs.grad = None
            out = steppo_loss(
                log_probs, None, layout=layout, config=config, backend=backend, **arguments
            )
            out.loss.backward()
            assert log_probs.grad.tolist() == wanted
    # Three packed tokens of one row; the two other rows, and so two steps, have none.
    rows = torch.tensor([0, 3, 3, 3])
    packed = StepLayout.from_mask(torch.ones(3), cu_seqlens=rows).per_trajectory()
    rewards = torch.tensor([1.0, 2.0, 4.0])
    for given, wanted in ((rewards, [1.0, 0.0, 0.0]), (rewards[None], [7.0, 0.0, 0.0])):
        values = torch.zeros(3)
        found = step_gae(given, values, packed, whiten=False, backend=backend)
        assert found.returns.tolist() == wanted


def test_numbers_per_row_become_numbers_per_step(backend):
    """``x[layout.step_rows]``; as many rows as steps are no other reading of a vector."""
    layout = StepLayout.from_mask(torch.tensor([[1, 0, 1], [0, 0, 0]]))
    per_row = torch.tensor([1.0, 5.0])
    log_probs = torch.zeros(2, 3, requires_grad=True)
    config = StepPOConfig(reduction="sum")
    advantages = per_row[layout.step_rows]
    out = steppo_loss(log_probs, None, advantages, layout, config=config, backend=backend)
    out.loss.backward()
    assert log_probs.grad.tolist() == [[-1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "kind", [np.float64, np.float32, np.float16, np.int64, np.int32, fractions.Fraction]
)
def test_numbers_of_other_types(backend, kind):
    one, config = kind(1), StepPOConfig(kl_coef=kind(1), dual_clip=kind(3), clip_high=kind(1))
    assert config == StepPOConfig(kl_coef=1.0, dual_clip=3.0, clip_high=1.0)
    rest = {"log_probs": _TOKENS, "layout": _LAYOUT, **_LOSS, "backend": backend}
    assert torch.equal(
        steppo_loss(**rest, normalizer=kind(2), config=config).loss,
        steppo_loss(**rest, normalizer=2.0, config=config).loss,
    )
    step_gae(_STEPS, _STEPS, _LAYOUT, gamma=one, lam=one, backend=backend)
    step_value_loss(_TOKENS, _STEPS, _LAYOUT, clip=one, normalizer=one, backend=backend)
    token_log_probs(_LOGITS, _IDS, temperature=one, backend=backend)
    linear_token_log_probs(_HIDDEN, _WEIGHT, _IDS, softcap=one, backend=backend)


def test_chunks_counted_by_other_types(backend):
    found = [
        linear_token_log_probs(_HIDDEN, _WEIGHT, _IDS, chunk_tokens=count, backend=backend)
        for count in (3, np.int64(3), np.int32(3))
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("number", [10**400, -(10**400), np.bool_(True), np.ones(1), "1", 1j])
def test_numbers_that_are_none(number):
    rest = {"log_probs": _TOKENS, "layout": _LAYOUT, **_LOSS}
    for name, call in (
        ("normalizer", lambda: steppo_loss(**rest, normalizer=number)),
        ("ratio_center", lambda: steppo_loss(**rest, ratio_center=number)),
        ("gamma", lambda: step_gae(_STEPS, _STEPS, _LAYOUT, gamma=number)),
        ("clip", lambda: step_value_loss(_TOKENS, _STEPS, _LAYOUT, clip=number)),
        ("temperature", lambda: token_log_probs(_LOGITS, _IDS, temperature=number)),
        ("softcap", lambda: linear_token_log_probs(_HIDDEN, _WEIGHT, _IDS, softcap=number)),
        ("kl_coef", lambda: StepPOConfig(kl_coef=number)),
        ("log_ratio_max", lambda: StepPOConfig(log_ratio_max=number)),
        ("ratio", lambda: StepPOConfig(ratio=number)),
        ("reduction", lambda: step_value_loss(_TOKENS, _STEPS, _LAYOUT, reduction=number)),
        ("backend", lambda: step_value_loss(_TOKENS, _STEPS, _LAYOUT, backend=number)),
        ("whiten", lambda: step_gae(_STEPS, _STEPS, _LAYOUT, whiten=number)),
        ("return_entropy", lambda: token_log_probs(_LOGITS, _IDS, return_entropy=number)),
        ("inplace_backward", lambda: token_log_probs(_LOGITS, _IDS, inplace_backward=number)),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: got .*expected"):
            call()


@pytest.mark.parametrize(
    "make",
    [list, tuple, np.array, lambda x: np.array(x, dtype=object), torch.tensor, iter],
    ids=["list", "tuple", "array", "object array", "tensor", "iterator"],
)
def test_sequences_of_every_kind(make):
    mask = torch.ones(3, 2)
    layout = StepLayout.from_rows(mask, make([7, 5, 7]), make([1, 0, 0]))
    assert layout.trajectory_steps.tolist() == [2, 0, 1]
    if make is not torch.tensor:
        named = StepLayout.from_rows(mask, make(["b", "a", "b"]), make([1, 0, 0]))
        assert named.trajectory_steps.tolist() == [2, 0, 1]


@pytest.mark.parametrize("wrong", [None, 1.5, "x", 10**30, [1], 1j, b"x", np.bool_(True)])
def test_entries_that_are_no_integers(wrong):
    mask = torch.ones(2, 2)
    with pytest.raises((TypeError, ValueError), match=r"^step_indices: got .*expected"):
        StepLayout.from_rows(mask, [0, 0], [0, wrong])
    if not isinstance(wrong, (str, int)):
        with pytest.raises(TypeError, match=r"^trajectory_ids: got .*expected"):
            StepLayout.from_rows(mask, [0, wrong], [0, 1])


def test_collections_without_an_order():
    for ids in ({0, 1}, {0: 1, 1: 2}, b"ab", "ab", np.array("ab"), np.array(3)):
        with pytest.raises(TypeError, match=r"^trajectory_ids: got .*expected"):
            StepLayout.from_rows(torch.ones(2, 2), ids, [0, 1])
        with pytest.raises(TypeError, match=r"^step_indices: got .*expected"):
            StepLayout.from_rows(torch.ones(2, 2), [0, 1], ids)
