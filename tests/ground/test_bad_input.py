"""Wrong calls: each raises, names the argument, and leaves its inputs as they were."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

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
from steppo_kernels.config import RATIOS

_MASK = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 1, 0, 0]], dtype=torch.bool)
_LAYOUT = StepLayout.from_mask(_MASK, backend="reference")
_TOKENS = torch.linspace(-1.0, -0.1, 12).reshape(2, 6)
_STEPS = torch.linspace(-1.0, 1.0, 4)
_IDS = torch.arange(12).reshape(2, 6)
_LOGITS = torch.linspace(-2.0, 2.0, 60).reshape(2, 6, 5)
_TARGETS = _IDS % 5
_HIDDEN = torch.linspace(-1.0, 1.0, 36).reshape(2, 6, 3)
_WEIGHT = torch.linspace(-1.0, 1.0, 15).reshape(5, 3)
_CENTERED = StepPOConfig(ratio="centered")
_NAN = float("nan")


def loss(**changed: Any) -> Callable[[], object]:
    arguments = {
        "log_probs": _TOKENS,
        "old_log_probs": _TOKENS,
        "advantages": _STEPS,
        "layout": _LAYOUT,
        **changed,
    }
    return lambda: steppo_loss(**arguments)


def mask_loss(**changed: Any) -> Callable[[], object]:
    return loss(**{"advantages": _TOKENS, "layout": _MASK, **changed})


def log_probs(**changed: Any) -> Callable[[], object]:
    arguments = {"logits": _LOGITS, "token_ids": _TARGETS, **changed}
    return lambda: token_log_probs(**arguments)


def logits_loss(**changed: Any) -> Callable[[], object]:
    arguments = {
        "logits": _LOGITS,
        "token_ids": _TARGETS,
        "old_log_probs": _TOKENS,
        "advantages": _STEPS,
        "layout": _LAYOUT,
        **changed,
    }
    return lambda: steppo_loss_from_logits(**arguments)


def value_loss(**changed: Any) -> Callable[[], object]:
    arguments = {"values": _TOKENS, "returns": _STEPS, "layout": _LAYOUT, **changed}
    return lambda: step_value_loss(**arguments)


def gae(**changed: Any) -> Callable[[], object]:
    arguments = {"rewards": _TOKENS, "values": _TOKENS, "layout": _LAYOUT, **changed}
    return lambda: step_gae(**arguments)


def broadcast(**changed: Any) -> Callable[[], object]:
    return lambda: broadcast_to_tokens(**{"per_step": _STEPS, "layout": _LAYOUT, **changed})


def from_mask(mask: Any = _MASK, **options: Any) -> Callable[[], object]:
    return lambda: StepLayout.from_mask(mask, **options)


def from_ids(ids: Any, **options: Any) -> Callable[[], object]:
    return lambda: StepLayout.from_step_ids(ids, **options)


def from_rows(
    mask: Any = _MASK, ids: Any = (0, 0), indices: Any = (0, 1), **options: Any
) -> Callable[[], object]:
    return lambda: StepLayout.from_rows(mask, ids, indices, **options)


def from_markers(
    ids: Any = _IDS, start: Any = (1, 2), end: Any = 3, **options: Any
) -> Callable[[], object]:
    return lambda: StepLayout.from_markers(ids, start, end, **options)


def packed(**options: Any) -> Callable[[], object]:
    """A packed mask of 12 tokens."""
    return from_mask(_MASK.reshape(-1), **options)


def with_one(value: float) -> torch.Tensor:
    """A float mask with one entry that is not 0 or 1."""
    mask = _MASK.float()
    mask[1, 4] = value
    return mask


def linear_log_probs(**changed: Any) -> Callable[[], object]:
    arguments = {"hidden": _HIDDEN, "weight": _WEIGHT, "token_ids": _TARGETS, **changed}
    return lambda: linear_token_log_probs(**arguments)


def linear_loss(**changed: Any) -> Callable[[], object]:
    arguments = {
        "hidden": _HIDDEN,
        "weight": _WEIGHT,
        "token_ids": _TARGETS,
        "old_log_probs": _TOKENS,
        "advantages": _STEPS,
        "layout": _LAYOUT,
        **changed,
    }
    return lambda: linear_steppo_loss(**arguments)


def with_target(value: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Tokens of which one, an action token, is `value`."""
    ids = _TARGETS.to(dtype, copy=True)
    ids[0, 4] = value
    return ids


def with_temperature(value: float) -> torch.Tensor:
    temperatures = torch.ones(2, 6)
    temperatures[0, 4] = value
    return temperatures


_META = _TOKENS.to("meta")
_KL = StepPOConfig(kl_coef=0.1)
_BONUS = StepPOConfig(entropy_coef=0.1)

# The exception, how its message begins, and the call.
_CALLS = [
    # steppo_loss
    (TypeError, "log_probs: got list", loss(log_probs=[0.0] * 12)),
    (TypeError, "log_probs: got torch.int64", loss(log_probs=_TOKENS.long())),
    (ValueError, "log_probs: got shape (2, 5)", loss(log_probs=_TOKENS[:, :5])),
    (ValueError, "log_probs: got a tensor on meta", loss(log_probs=_META)),
    (TypeError, "log_probs: got torch.complex64", loss(log_probs=_TOKENS + 0j)),
    (ValueError, "old_log_probs: got shape (13,)", loss(old_log_probs=torch.zeros(13))),
    (ValueError, "old_log_probs: got a tensor on meta", loss(old_log_probs=_META)),
    (TypeError, "old_log_probs: got float", loss(old_log_probs=0.0)),
    (ValueError, "advantages: got shape (3,)", loss(advantages=_STEPS[:3])),
    (TypeError, "advantages: got torch.int32", loss(advantages=_STEPS.int())),
    (TypeError, "advantages: got NoneType", loss(advantages=None)),
    (ValueError, "advantages: got a tensor", loss(advantages=_STEPS.to("meta"))),
    (ValueError, "advantages: got shape (4, 1)", loss(advantages=_STEPS[:, None])),
    (ValueError, "advantages: got shape (4,)", mask_loss(advantages=_STEPS)),
    (TypeError, "layout: got NoneType", loss(layout=None)),
    (TypeError, "layout: got list", loss(layout=[[0, 1]])),
    (ValueError, "log_probs: got a tensor on cpu", loss(layout=_LAYOUT.to("meta"))),
    (ValueError, "layout: got the value nan", mask_loss(layout=with_one(_NAN))),
    (ValueError, "layout: got the value 2", mask_loss(layout=with_one(2.0))),
    (ValueError, "layout: got shape (1, 2, 6)", mask_loss(layout=_MASK[None])),
    (TypeError, "layout: got torch.complex64", mask_loss(layout=_MASK + 0j)),
    (TypeError, "config: got dict", loss(config={"clip_low": 0.1})),
    (ValueError, "ref_log_probs: got None", loss(config=_KL)),
    (ValueError, "ref_log_probs: got shape (4,)", loss(config=_KL, ref_log_probs=_STEPS)),
    (ValueError, "entropy: got None", mask_loss(config=_BONUS)),
    (ValueError, "entropy: got shape (2, 7)", loss(entropy=torch.zeros(2, 7))),
    (TypeError, "entropy: got torch.bool", loss(entropy=_MASK)),
    (ValueError, "is_weights: got shape (5,)", loss(is_weights=torch.ones(5))),
    (ValueError, "is_weights: got shape", mask_loss(is_weights=_STEPS)),
    (TypeError, "is_weights: got float", loss(is_weights=1.0)),
    (ValueError, "step_weights: got it with a mask", mask_loss(step_weights=_STEPS)),
    (ValueError, "step_weights: got shape (2, 6)", loss(step_weights=_TOKENS)),
    (ValueError, "normalizer: got 0, expected a finite number above 0", loss(normalizer=0)),
    (ValueError, "normalizer: got -2.0", loss(normalizer=-2.0)),
    (ValueError, "normalizer: got nan", mask_loss(normalizer=_NAN)),
    (ValueError, "normalizer: got inf", loss(normalizer=float("inf"))),
    (TypeError, "normalizer: got bool", loss(normalizer=True)),
    (TypeError, "normalizer: got str", loss(normalizer="4")),
    (ValueError, "normalizer: got shape (1,)", loss(normalizer=torch.ones(1))),
    (TypeError, "normalizer: got torch.bool", loss(normalizer=torch.tensor(True))),
    (ValueError, "normalizer: got a tensor", loss(normalizer=torch.ones((), device="meta"))),
    (ValueError, "ratio_center: got nan", loss(ratio_center=_NAN, config=_CENTERED)),
    (ValueError, "ratio_center: got shape", loss(ratio_center=_STEPS, config=_CENTERED)),
    (ValueError, "backend: got 'numpy'", loss(backend="numpy")),
    (ValueError, "backend: got None", loss(backend=None)),
    (RuntimeError, "backend: 'cuda' cannot run on cpu", loss(backend="cuda")),
    (TypeError, "whiten: got str", gae(whiten="no")),
    # linear_token_log_probs and linear_steppo_loss
    (TypeError, "hidden: got list", linear_log_probs(hidden=[0.0])),
    (TypeError, "hidden: got torch.int64", linear_log_probs(hidden=_HIDDEN.long())),
    (TypeError, "weight: got NoneType", linear_log_probs(weight=None)),
    (ValueError, "weight: got a tensor on meta", linear_log_probs(weight=_WEIGHT.to("meta"))),
    (ValueError, "weight: got shape (3,)", linear_log_probs(weight=_WEIGHT[0])),
    (ValueError, "weight: got shape (3, 5) with", linear_log_probs(weight=_WEIGHT.t())),
    (ValueError, "weight: got shape (0, 3)", linear_log_probs(weight=_WEIGHT[:0])),
    (TypeError, "weight: got torch.float64", linear_log_probs(weight=_WEIGHT.double())),
    (ValueError, "bias: got shape (3,)", linear_log_probs(bias=_WEIGHT[0])),
    (TypeError, "bias: got torch.float16", linear_log_probs(bias=_WEIGHT[:, 0].half())),
    (TypeError, "bias: got torch.int64", linear_log_probs(bias=_IDS[0, :5])),
    (ValueError, "token_ids: got shape (2, 5)", linear_log_probs(token_ids=_TARGETS[:, :5])),
    (ValueError, "token_ids: got 5, expected", linear_log_probs(token_ids=with_target(5))),
    (ValueError, "mask: got shape (2, 5)", linear_log_probs(mask=_MASK[:, :5])),
    (ValueError, "softcap: got 0", linear_log_probs(softcap=0)),
    (ValueError, "softcap: got nan", linear_log_probs(softcap=_NAN)),
    (TypeError, "softcap: got str", linear_log_probs(softcap="30")),
    (ValueError, "temperature: got 0", linear_log_probs(temperature=0)),
    (ValueError, "chunk_tokens: got 0", linear_log_probs(chunk_tokens=0)),
    (TypeError, "chunk_tokens: got float", linear_log_probs(chunk_tokens=2.0)),
    (TypeError, "chunk_tokens: got bool", linear_log_probs(chunk_tokens=True)),
    (ValueError, "hidden: got shape (2, 5, 3)", linear_loss(hidden=_HIDDEN[:, :5])),
    (ValueError, "hidden: got a tensor on meta", linear_loss(hidden=_HIDDEN.to("meta"))),
    (TypeError, "hidden: got NoneType", linear_loss(hidden=None)),
    (ValueError, "old_log_probs: got shape (13,)", linear_loss(old_log_probs=torch.zeros(13))),
    (ValueError, "advantages: got shape (3,)", linear_loss(advantages=_STEPS[:3])),
    (
        ValueError,
        "token_ids: got shape (12, 1, 2)",
        linear_loss(token_ids=_IDS.view(12, 1, 1).expand(12, 1, 2)),
    ),
    (ValueError, "token_ids: got 9, expected", linear_loss(token_ids=with_target(9))),
    (ValueError, "ref_log_probs: got None", linear_loss(config=_KL)),
    (ValueError, "chunk_tokens: got -1", linear_loss(chunk_tokens=-1)),
    (ValueError, "normalizer: got 0", linear_loss(normalizer=0)),
    (TypeError, "layout: got NoneType", linear_loss(layout=None)),
    (RuntimeError, "backend: 'cuda' cannot run", linear_loss(backend="cuda")),
    # token_log_probs
    (TypeError, "logits: got list", log_probs(logits=[0.0])),
    (TypeError, "logits: got torch.int64", log_probs(logits=_IDS)),
    (TypeError, "logits: got torch.complex64", log_probs(logits=_LOGITS + 0j)),
    (ValueError, "logits: got shape ()", log_probs(logits=torch.tensor(1.0))),
    (
        ValueError,
        "logits: got shape (2, 6, 0), expected [..., V]",
        log_probs(logits=_LOGITS[..., :0]),
    ),
    (TypeError, "token_ids: got list", log_probs(token_ids=[0] * 12)),
    (TypeError, "token_ids: got torch.float32", log_probs(token_ids=_TOKENS)),
    (TypeError, "token_ids: got torch.bool", log_probs(token_ids=_MASK)),
    (ValueError, "token_ids: got shape (2, 5)", log_probs(token_ids=_TARGETS[:, :5])),
    (ValueError, "token_ids: got a tensor on meta", log_probs(token_ids=_TARGETS.to("meta"))),
    (ValueError, "token_ids: got 5, expected ids from 0 to 4", log_probs(token_ids=with_target(5))),
    (ValueError, "token_ids: got -1, expected ids", log_probs(token_ids=with_target(-1))),
    (
        ValueError,
        "token_ids: got -1, expected ids",
        log_probs(token_ids=with_target(-1), mask=_MASK),
    ),
    (
        ValueError,
        "token_ids: got -100, expected ids",
        log_probs(token_ids=with_target(-100, torch.int8), backend="reference"),
    ),
    (ValueError, "temperature: got 0, expected", log_probs(temperature=0)),
    (ValueError, "temperature: got -1.0", log_probs(temperature=-1.0)),
    (ValueError, "temperature: got nan", log_probs(temperature=_NAN)),
    (ValueError, "temperature: got inf", log_probs(temperature=float("inf"))),
    (TypeError, "temperature: got str", log_probs(temperature="1")),
    (TypeError, "temperature: got bool", log_probs(temperature=True)),
    (TypeError, "temperature: got torch.int64", log_probs(temperature=_IDS)),
    (ValueError, "temperature: got shape (2,)", log_probs(temperature=torch.ones(2))),
    (ValueError, "temperature: got shape ()", log_probs(temperature=torch.tensor(1.0))),
    (ValueError, "temperature: got a tensor on meta", log_probs(temperature=_META)),
    (ValueError, "temperature: got 0.0", log_probs(temperature=with_temperature(0.0))),
    (ValueError, "temperature: got -0.5", log_probs(temperature=with_temperature(-0.5))),
    (ValueError, "temperature: got nan", log_probs(temperature=with_temperature(_NAN))),
    (
        ValueError,
        "temperature: got inf",
        log_probs(temperature=with_temperature(float("inf")), mask=_MASK),
    ),
    (TypeError, "mask: got list", log_probs(mask=[True] * 12)),
    (TypeError, "mask: got torch.complex64", log_probs(mask=_MASK + 0j)),
    (ValueError, "mask: got shape (2, 5)", log_probs(mask=_MASK[:, :5])),
    (ValueError, "mask: got the value 2", log_probs(mask=with_one(2.0))),
    (ValueError, "mask: got a tensor on meta", log_probs(mask=_MASK.to("meta"))),
    (ValueError, "backend: got 'gpu'", log_probs(backend="gpu")),
    (RuntimeError, "backend: 'cuda' cannot run on cpu", log_probs(backend="cuda")),
    # steppo_loss_from_logits
    (TypeError, "logits: got NoneType", logits_loss(logits=None)),
    (ValueError, "logits: got shape (2, 5, 5)", logits_loss(logits=_LOGITS[:, :5])),
    (ValueError, "logits: got shape (2, 6)", logits_loss(logits=_TOKENS)),
    (ValueError, "logits: got a tensor on meta", logits_loss(logits=_LOGITS.to("meta"))),
    (ValueError, "token_ids: got shape (6, 1)", logits_loss(token_ids=_TARGETS[:1].mT)),
    (TypeError, "token_ids: got torch.float32", logits_loss(token_ids=_TOKENS)),
    (ValueError, "token_ids: got 7", logits_loss(token_ids=with_target(7))),
    (ValueError, "token_ids: got -9", logits_loss(token_ids=with_target(-9), backend="reference")),
    (ValueError, "old_log_probs: got shape (13,)", logits_loss(old_log_probs=torch.zeros(13))),
    (ValueError, "advantages: got shape (3,)", logits_loss(advantages=_STEPS[:3])),
    (ValueError, "advantages: got shape (4,)", logits_loss(layout=_MASK)),
    (TypeError, "layout: got NoneType", logits_loss(layout=None)),
    (ValueError, "layout: got the value nan", logits_loss(layout=with_one(_NAN))),
    (TypeError, "config: got dict", logits_loss(config={})),
    (ValueError, "ref_log_probs: got None", logits_loss(config=_KL)),
    (ValueError, "is_weights: got shape (5,)", logits_loss(is_weights=torch.ones(5))),
    (
        ValueError,
        "step_weights: got it with a mask",
        logits_loss(step_weights=_STEPS, advantages=_TOKENS, layout=_MASK),
    ),
    (ValueError, "normalizer: got 0.0", logits_loss(normalizer=0.0)),
    (ValueError, "temperature: got 0.0", logits_loss(temperature=0.0)),
    (ValueError, "temperature: got nan", logits_loss(temperature=with_temperature(_NAN))),
    (ValueError, "temperature: got shape (3,)", logits_loss(temperature=torch.ones(3))),
    (RuntimeError, "backend: 'cuda' cannot run", logits_loss(backend="cuda")),
    # step_value_loss
    (ValueError, "values: got shape (3,)", value_loss(values=_STEPS[:3])),
    (TypeError, "values: got torch.int32", value_loss(values=_TOKENS.int())),
    (ValueError, "returns: got shape (2, 6)", value_loss(returns=_TOKENS)),
    (ValueError, "returns: got a tensor on meta", value_loss(returns=_STEPS.to("meta"))),
    (ValueError, "old_values: got shape (5,)", value_loss(old_values=torch.ones(5))),
    (ValueError, "clip: got 0.0", value_loss(clip=0.0)),
    (ValueError, "clip: got nan", value_loss(clip=_NAN)),
    (TypeError, "clip: got bool", value_loss(clip=True)),
    (TypeError, "clip: got NoneType", value_loss(clip=None)),
    (ValueError, "reduction: got 'mean'", value_loss(reduction="mean")),
    (ValueError, "normalizer: got 0.0", value_loss(normalizer=0.0)),
    (TypeError, "layout: got Tensor", value_loss(layout=_MASK)),
    (RuntimeError, "backend: 'cuda' cannot run", value_loss(backend="cuda")),
    # step_gae
    (ValueError, "rewards: got shape (2,)", gae(rewards=_STEPS[:2])),
    (ValueError, "rewards: got a tensor on meta", gae(rewards=_META)),
    (TypeError, "rewards: got torch.int64", gae(rewards=_STEPS.long())),
    (ValueError, "values: got a tensor on meta", gae(values=_META)),
    (TypeError, "values: got NoneType", gae(values=None)),
    (ValueError, "bootstrap_values: got shape (4,)", gae(bootstrap_values=_STEPS)),
    (TypeError, "bootstrap_values: got float", gae(bootstrap_values=0.0)),
    (ValueError, "gamma: got 1.5", gae(gamma=1.5)),
    (ValueError, "gamma: got nan", gae(gamma=_NAN)),
    (TypeError, "gamma: got bool", gae(gamma=True)),
    (ValueError, "lam: got -0.1", gae(lam=-0.1)),
    (TypeError, "lam: got str", gae(lam="1")),
    (TypeError, "layout: got Tensor", gae(layout=_MASK)),
    (ValueError, "backend: got 'gpu'", gae(backend="gpu")),
    # broadcast_to_tokens
    (ValueError, "per_step: got shape (2, 6)", broadcast(per_step=_TOKENS)),
    (TypeError, "per_step: got torch.int32", broadcast(per_step=_STEPS.int())),
    (ValueError, "per_step: got a tensor", broadcast(per_step=_STEPS.to("meta"))),
    (TypeError, "layout: got NoneType", broadcast(layout=None)),
    # StepLayout.from_mask
    (TypeError, "mask: got list", from_mask([[0, 1]])),
    (ValueError, "mask: got shape", from_mask(_MASK[None])),
    (ValueError, "mask: got shape ()", from_mask(torch.tensor(True))),
    (ValueError, "mask: got the value 2", from_mask(with_one(2))),
    (ValueError, "mask: got the value -1", from_mask(_MASK.int() - 1)),
    (ValueError, "mask: got the value nan", from_mask(with_one(_NAN))),
    (ValueError, "mask: got the value 0.5", from_mask(with_one(0.5))),
    (ValueError, "boundaries: got shape", from_mask(boundaries=_MASK[:1])),
    (ValueError, "boundaries: got a tensor", from_mask(boundaries=_MASK.to("meta"))),
    (ValueError, "boundaries: got the value 2", from_mask(boundaries=_MASK.int() * 2)),
    (RuntimeError, "backend: 'cuda' cannot run", from_mask(backend="cuda")),
    (ValueError, "cu_seqlens: got it with mask", from_mask(cu_seqlens=torch.tensor([0, 12]))),
    (ValueError, "cu_seqlens: got 4 after 8", packed(cu_seqlens=torch.tensor([0, 8, 4, 12]))),
    (ValueError, "cu_seqlens: got offsets from 0 to 11", packed(cu_seqlens=torch.tensor([0, 11]))),
    (ValueError, "cu_seqlens: got offsets from 1", packed(cu_seqlens=torch.tensor([1, 12]))),
    (
        ValueError,
        "cu_seqlens: got an empty",
        packed(cu_seqlens=torch.tensor([], dtype=torch.int32)),
    ),
    (TypeError, "cu_seqlens: got torch.float32", packed(cu_seqlens=torch.tensor([0.0, 12.0]))),
    (TypeError, "cu_seqlens: got list", packed(cu_seqlens=[0, 12])),
    (ValueError, "cu_seqlens: got shape", packed(cu_seqlens=torch.tensor([[0, 12]]))),
    (
        ValueError,
        "cu_seqlens: got a tensor on meta",
        packed(cu_seqlens=torch.zeros(2, dtype=torch.int32, device="meta")),
    ),
    # StepLayout.from_step_ids
    (TypeError, "step_ids: got torch.float32", from_ids(_TOKENS)),
    (TypeError, "step_ids: got torch.bool", from_ids(_MASK)),
    (ValueError, "step_ids: got -2", from_ids(torch.tensor([0, -2, 1]))),
    (ValueError, "step_ids: got an id at flat position 2", from_ids(torch.tensor([0, 2, 1]))),
    (ValueError, "step_ids: got shape", from_ids(torch.zeros((1, 1, 1), dtype=torch.int64))),
    # StepLayout.from_rows
    (ValueError, "mask: got shape (6,)", from_rows(_MASK[0])),
    (
        ValueError,
        "step_indices: got step 3 of one trajectory in rows 0 and 1",
        from_rows(indices=(3, 3)),
    ),
    (ValueError, "step_indices: got step 0", from_rows(ids=("a", "a"), indices=(0, 0))),
    (ValueError, "trajectory_ids: got shape (1,)", from_rows(ids=(0,))),
    (TypeError, "trajectory_ids: got torch.float32", from_rows(ids=torch.zeros(2))),
    (TypeError, "trajectory_ids: got an entry of type NoneType", from_rows(ids=(None, None))),
    (TypeError, "trajectory_ids: got an entry of type bool", from_rows(ids=(True, False))),
    (TypeError, "trajectory_ids: got an entry of type float", from_rows(ids=(0.0, 1.0))),
    (ValueError, "step_indices: got shape (3,)", from_rows(indices=(0, 1, 2))),
    (TypeError, "step_indices: got torch.float32", from_rows(indices=torch.zeros(2))),
    (TypeError, "step_indices: got an entry of type str", from_rows(indices=("a", "b"))),
    (ValueError, "valid: got shape (1,)", from_rows(valid=torch.ones(1))),
    (ValueError, "valid: got the value 2", from_rows(valid=torch.tensor([1, 2]))),
    (TypeError, "valid: got list", from_rows(valid=[True, True])),
    # StepLayout.from_markers
    (TypeError, "token_ids: got torch.float32", from_markers(_TOKENS)),
    (ValueError, "start: got an empty sequence", from_markers(start=[])),
    (TypeError, "start: got float", from_markers(start=[1.5])),
    (
        ValueError,
        "start: got shape (1, 2)",
        from_markers(start=torch.ones((1, 2), dtype=torch.int64)),
    ),
    (TypeError, "start: got str", from_markers(start="ab")),
    (TypeError, "end: got NoneType", from_markers(end=None)),
    (TypeError, "end: got bool", from_markers(end=True)),
    (ValueError, "end: got an empty sequence", from_markers(end=[])),
    (TypeError, "end: got float", from_markers(end=[3, 1.5])),
    (TypeError, "stop: got str", from_markers(stop="<|im_start|>")),
    (ValueError, "stop: got an empty sequence", from_markers(stop=[[1], []])),
    (ValueError, "valid: got shape (12,)", from_markers(valid=_MASK.reshape(-1))),
    (ValueError, "valid: got the value 2", from_markers(valid=with_one(2.0))),
    (
        ValueError,
        "cu_seqlens: got it with token_ids",
        from_markers(cu_seqlens=torch.tensor([0, 12])),
    ),
]


def everything_shared() -> list[torch.Tensor]:
    return [
        value.clone() for value in (_MASK, _TOKENS, _STEPS, _LOGITS, _TARGETS, _LAYOUT.step_ids)
    ]


@pytest.mark.parametrize(("exception", "text", "call"), _CALLS, ids=[text for _, text, _ in _CALLS])
def test_wrong_call(exception, text, call):
    before = everything_shared()
    with pytest.raises(exception, match=f"^{re.escape(text)}") as caught:
        call()
    assert "expected" in str(caught.value) or "cannot run" in str(caught.value)
    for value, kept in zip(everything_shared(), before, strict=True):
        assert torch.equal(value, kept)


def test_the_calls_are_right_without_their_mistake():
    for call in (
        loss(),
        mask_loss(),
        value_loss(),
        gae(),
        broadcast(),
        from_mask(),
        packed(),
        from_rows(),
        from_markers(),
        from_ids(torch.tensor([0, -1, 1])),
        packed(cu_seqlens=torch.tensor([0, 4, 12])),
        loss(normalizer=torch.tensor(3)),
        loss(config=_KL, ref_log_probs=_TOKENS),
        loss(config=_BONUS, entropy=_TOKENS),
        log_probs(),
        logits_loss(),
        logits_loss(layout=_MASK, advantages=_TOKENS),
        log_probs(mask=~_MASK, token_ids=torch.where(_MASK, -100, _TARGETS)),
        log_probs(mask=_MASK, temperature=torch.where(_MASK, 1.0, _NAN)),
        logits_loss(config=_BONUS, temperature=torch.where(_MASK, 1.0, 0.0)),
    ):
        assert call() is not None


def test_wrong_calls_do_not_depend_on_the_backend(target):
    """Checks come before dispatch: the same exceptions whichever backend is asked for."""
    if target.device != "cpu":
        pytest.skip("the calls hold CPU tensors")
    for ratio in RATIOS:
        config = StepPOConfig(ratio=ratio)
        with pytest.raises(ValueError, match=r"^old_log_probs: "):
            loss(old_log_probs=torch.zeros(13), config=config, backend=target.backend)()
        with pytest.raises(ValueError, match=r"^layout: got the value nan"):
            mask_loss(layout=with_one(_NAN), config=config, backend=target.backend)()
    with pytest.raises(ValueError, match=r"^cu_seqlens: got 4 after 8"):
        packed(cu_seqlens=torch.tensor([0, 8, 4, 12]), backend=target.backend)()
