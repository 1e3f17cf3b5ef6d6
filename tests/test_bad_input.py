"""Wrong calls: each raises, names the argument, and leaves its inputs as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    broadcast_to_tokens,
    step_gae,
    step_value_loss,
    steppo_loss,
)
from steppo_kernels.config import RATIOS

_MASK = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 1, 0, 0]], dtype=torch.bool)
_LAYOUT = StepLayout.from_mask(_MASK, backend="reference")
_TOKENS = torch.linspace(-1.0, -0.1, 12).reshape(2, 6)
_STEPS = torch.linspace(-1.0, 1.0, 4)
_NAN = float("nan")


def loss(**changed: Any) -> Callable[[], object]:
    arguments = {
        "log_probs": _TOKENS, "old_log_probs": _TOKENS, "advantages": _STEPS, "layout": _LAYOUT,
        **changed,
    }  # fmt: skip
    return lambda: steppo_loss(**arguments)


def mask_loss(**changed: Any) -> Callable[[], object]:
    return loss(**{"advantages": _TOKENS, "layout": _MASK, **changed})


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
    ids: Any = _TOKENS.long(), start: Any = (1, 2), end: Any = 3, **options: Any
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


_META = _TOKENS.to("meta")
_KL = StepPOConfig(kl_coef=0.1)
_BONUS = StepPOConfig(entropy_coef=0.1)

# What is wrong: the call, the exception, and how its message begins.
_CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    # steppo_loss
    "log_probs is a list": (loss(log_probs=[0.0] * 12), TypeError, "log_probs: got list"),
    "log_probs is int": (loss(log_probs=_TOKENS.long()), TypeError, "log_probs: got torch.int64"),
    "log_probs too short": (loss(log_probs=_TOKENS[:, :5]), ValueError, r"log_probs: got shape \(2, 5\)"),
    "log_probs on meta": (loss(log_probs=_META), ValueError, "log_probs: got a tensor on meta"),
    "log_probs complex": (loss(log_probs=_TOKENS + 0j), TypeError, "log_probs: got torch.complex64"),
    "old too long": (loss(old_log_probs=torch.zeros(13)), ValueError, r"old_log_probs: got shape \(13,\)"),
    "old on meta": (loss(old_log_probs=_META), ValueError, "old_log_probs: got a tensor on meta"),
    "old is a number": (loss(old_log_probs=0.0), TypeError, "old_log_probs: got float"),
    "advantages too short": (loss(advantages=_STEPS[:3]), ValueError, r"advantages: got shape \(3,\)"),
    "advantages are int": (loss(advantages=_STEPS.int()), TypeError, "advantages: got torch.int32"),
    "advantages are None": (loss(advantages=None), TypeError, "advantages: got NoneType"),
    "advantages on meta": (loss(advantages=_STEPS.to("meta")), ValueError, "advantages: got a tensor"),
    "advantages 2-D per step": (loss(advantages=_STEPS[:, None]), ValueError, r"advantages: got shape \(4, 1\)"),
    "advantages per step with a mask": (mask_loss(advantages=_STEPS), ValueError, r"advantages: got shape \(4,\)"),
    "layout is None": (loss(layout=None), TypeError, "layout: got NoneType"),
    "layout is a list": (loss(layout=[[0, 1]]), TypeError, "layout: got list"),
    "layout on meta": (loss(layout=_LAYOUT.to("meta")), ValueError, "log_probs: got a tensor on cpu"),
    "layout is a mask of NaN": (mask_loss(layout=with_one(_NAN)), ValueError, "layout: got the value nan"),
    "layout is a mask of 2": (mask_loss(layout=with_one(2.0)), ValueError, "layout: got the value 2"),
    "layout is a 3-D mask": (mask_loss(layout=_MASK[None]), ValueError, r"layout: got shape \(1, 2, 6\)"),
    "layout is a complex mask": (mask_loss(layout=_MASK + 0j), TypeError, "layout: got torch.complex64"),
    "config is a dict": (loss(config={"clip_low": 0.1}), TypeError, "config: got dict"),
    "KL without ref": (loss(config=_KL), ValueError, "ref_log_probs: got None"),
    "ref too short": (loss(config=_KL, ref_log_probs=_STEPS), ValueError, r"ref_log_probs: got shape \(4,\)"),
    "entropy missing": (mask_loss(config=_BONUS), ValueError, "entropy: got None"),
    "entropy too long": (loss(entropy=torch.zeros(2, 7)), ValueError, r"entropy: got shape \(2, 7\)"),
    "entropy is bool": (loss(entropy=_MASK), TypeError, "entropy: got torch.bool"),
    "is_weights too long": (loss(is_weights=torch.ones(5)), ValueError, r"is_weights: got shape \(5,\)"),
    "is_weights per step with a mask": (mask_loss(is_weights=_STEPS), ValueError, "is_weights: got shape"),
    "is_weights is a number": (loss(is_weights=1.0), TypeError, "is_weights: got float"),
    "step_weights with a mask": (mask_loss(step_weights=_STEPS), ValueError, "step_weights: got it with a mask"),
    "step_weights per token": (loss(step_weights=_TOKENS), ValueError, r"step_weights: got shape \(2, 6\)"),
    "normalizer 0": (loss(normalizer=0), ValueError, "normalizer: got 0, expected a finite number above 0"),
    "normalizer negative": (loss(normalizer=-2.0), ValueError, "normalizer: got -2.0"),
    "normalizer NaN": (mask_loss(normalizer=_NAN), ValueError, "normalizer: got nan"),
    "normalizer infinite": (loss(normalizer=float("inf")), ValueError, "normalizer: got inf"),
    "normalizer is bool": (loss(normalizer=True), TypeError, "normalizer: got bool"),
    "normalizer is a string": (loss(normalizer="4"), TypeError, "normalizer: got str"),
    "normalizer has a dimension": (loss(normalizer=torch.ones(1)), ValueError, r"normalizer: got shape \(1,\)"),
    "normalizer is a bool tensor": (loss(normalizer=torch.tensor(True)), TypeError, "normalizer: got torch.bool"),
    "normalizer on meta": (loss(normalizer=torch.ones((), device="meta")), ValueError, "normalizer: got a tensor"),
    "ratio_center NaN": (loss(ratio_center=_NAN), ValueError, "ratio_center: got nan"),
    "ratio_center has a dimension": (loss(ratio_center=_STEPS), ValueError, "ratio_center: got shape"),
    "backend unknown": (loss(backend="numpy"), ValueError, "backend: got 'numpy'"),
    "backend is None": (loss(backend=None), ValueError, "backend: got None"),
    "backend cuda on the CPU": (loss(backend="cuda"), RuntimeError, "backend: 'cuda' cannot run on cpu"),
    # step_value_loss
    "values too short": (value_loss(values=_STEPS[:3]), ValueError, r"values: got shape \(3,\)"),
    "values are int": (value_loss(values=_TOKENS.int()), TypeError, "values: got torch.int32"),
    "returns per token": (value_loss(returns=_TOKENS), ValueError, r"returns: got shape \(2, 6\)"),
    "returns on meta": (value_loss(returns=_STEPS.to("meta")), ValueError, "returns: got a tensor on meta"),
    "old_values too long": (value_loss(old_values=torch.ones(5)), ValueError, r"old_values: got shape \(5,\)"),
    "value clip 0": (value_loss(clip=0.0), ValueError, "clip: got 0.0"),
    "value clip NaN": (value_loss(clip=_NAN), ValueError, "clip: got nan"),
    "value clip bool": (value_loss(clip=True), TypeError, "clip: got bool"),
    "value clip None": (value_loss(clip=None), TypeError, "clip: got NoneType"),
    "value reduction unknown": (value_loss(reduction="mean"), ValueError, "reduction: got 'mean'"),
    "value normalizer 0": (value_loss(normalizer=0.0), ValueError, "normalizer: got 0.0"),
    "value layout is a mask": (value_loss(layout=_MASK), TypeError, "layout: got Tensor"),
    "value backend cuda": (value_loss(backend="cuda"), RuntimeError, "backend: 'cuda' cannot run"),
    # step_gae
    "rewards too short": (gae(rewards=_STEPS[:2]), ValueError, r"rewards: got shape \(2,\)"),
    "rewards on meta": (gae(rewards=_META), ValueError, "rewards: got a tensor on meta"),
    "rewards are int": (gae(rewards=_STEPS.long()), TypeError, "rewards: got torch.int64"),
    "GAE values on meta": (gae(values=_META), ValueError, "values: got a tensor on meta"),
    "GAE values are None": (gae(values=None), TypeError, "values: got NoneType"),
    "bootstrap per step": (gae(bootstrap_values=_STEPS), ValueError, r"bootstrap_values: got shape \(4,\)"),
    "bootstrap a number": (gae(bootstrap_values=0.0), TypeError, "bootstrap_values: got float"),
    "gamma above 1": (gae(gamma=1.5), ValueError, "gamma: got 1.5"),
    "gamma NaN": (gae(gamma=_NAN), ValueError, "gamma: got nan"),
    "gamma bool": (gae(gamma=True), TypeError, "gamma: got bool"),
    "lam negative": (gae(lam=-0.1), ValueError, "lam: got -0.1"),
    "lam a string": (gae(lam="1"), TypeError, "lam: got str"),
    "GAE layout is a mask": (gae(layout=_MASK), TypeError, "layout: got Tensor"),
    "GAE backend unknown": (gae(backend="gpu"), ValueError, "backend: got 'gpu'"),
    # broadcast_to_tokens
    "per_step per token": (broadcast(per_step=_TOKENS), ValueError, r"per_step: got shape \(2, 6\)"),
    "per_step is int": (broadcast(per_step=_STEPS.int()), TypeError, "per_step: got torch.int32"),
    "per_step on meta": (broadcast(per_step=_STEPS.to("meta")), ValueError, "per_step: got a tensor"),
    "broadcast layout None": (broadcast(layout=None), TypeError, "layout: got NoneType"),
    # StepLayout.from_mask
    "mask is a list": (from_mask([[0, 1]]), TypeError, "mask: got list"),
    "mask 3-D": (from_mask(_MASK[None]), ValueError, "mask: got shape"),
    "mask 0-D": (from_mask(torch.tensor(True)), ValueError, r"mask: got shape \(\)"),
    "mask holds 2": (from_mask(with_one(2)), ValueError, "mask: got the value 2"),
    "mask holds -1": (from_mask(_MASK.int() - 1), ValueError, "mask: got the value -1"),
    "mask holds NaN": (from_mask(with_one(_NAN)), ValueError, "mask: got the value nan"),
    "mask holds 0.5": (from_mask(with_one(0.5)), ValueError, "mask: got the value 0.5"),
    "boundaries of another shape": (from_mask(boundaries=_MASK[:1]), ValueError, "boundaries: got shape"),
    "boundaries on meta": (from_mask(boundaries=_MASK.to("meta")), ValueError, "boundaries: got a tensor"),
    "boundaries hold 2": (from_mask(boundaries=_MASK.int() * 2), ValueError, "boundaries: got the value 2"),
    "mask backend cuda": (from_mask(backend="cuda"), RuntimeError, "backend: 'cuda' cannot run"),
    "cu_seqlens with 2-D": (from_mask(cu_seqlens=torch.tensor([0, 12])), ValueError, "cu_seqlens: got it with mask"),
    "cu_seqlens decreases": (packed(cu_seqlens=torch.tensor([0, 8, 4, 12])), ValueError, "cu_seqlens: got 4 after 8"),
    "cu_seqlens ends early": (packed(cu_seqlens=torch.tensor([0, 11])), ValueError, "cu_seqlens: got offsets from 0 to 11"),
    "cu_seqlens starts at 1": (packed(cu_seqlens=torch.tensor([1, 12])), ValueError, "cu_seqlens: got offsets from 1"),
    "cu_seqlens empty": (packed(cu_seqlens=torch.tensor([], dtype=torch.int32)), ValueError, "cu_seqlens: got an empty"),
    "cu_seqlens float": (packed(cu_seqlens=torch.tensor([0.0, 12.0])), TypeError, "cu_seqlens: got torch.float32"),
    "cu_seqlens a list": (packed(cu_seqlens=[0, 12]), TypeError, "cu_seqlens: got list"),
    "cu_seqlens 2-D": (packed(cu_seqlens=torch.tensor([[0, 12]])), ValueError, "cu_seqlens: got shape"),
    "cu_seqlens on meta": (packed(cu_seqlens=torch.zeros(2, dtype=torch.int32, device="meta")), ValueError, "cu_seqlens: got a tensor on meta"),
    # StepLayout.from_step_ids
    "step_ids float": (from_ids(_TOKENS), TypeError, "step_ids: got torch.float32"),
    "step_ids bool": (from_ids(_MASK), TypeError, "step_ids: got torch.bool"),
    "step_ids below -1": (from_ids(torch.tensor([0, -2, 1])), ValueError, "step_ids: got -2"),
    "step_ids decrease": (from_ids(torch.tensor([0, 2, 1])), ValueError, "step_ids: got an id at flat position 2"),
    "step_ids 3-D": (from_ids(torch.zeros((1, 1, 1), dtype=torch.int64)), ValueError, "step_ids: got shape"),
    # StepLayout.from_rows
    "rows of a 1-D mask": (from_rows(_MASK[0]), ValueError, r"mask: got shape \(6,\)"),
    "rows duplicate": (from_rows(indices=(3, 3)), ValueError, "step_indices: got step 3 of one trajectory in rows 0 and 1"),
    "rows duplicate strings": (from_rows(ids=("a", "a"), indices=(0, 0)), ValueError, "step_indices: got step 0"),
    "too few trajectory_ids": (from_rows(ids=(0,)), ValueError, r"trajectory_ids: got shape \(1,\)"),
    "trajectory_ids float": (from_rows(ids=torch.zeros(2)), TypeError, "trajectory_ids: got torch.float32"),
    "trajectory_ids of None": (from_rows(ids=(None, None)), TypeError, "trajectory_ids: got an entry of type NoneType"),
    "trajectory_ids of bool": (from_rows(ids=(True, False)), TypeError, "trajectory_ids: got an entry of type bool"),
    "trajectory_ids of float": (from_rows(ids=(0.0, 1.0)), TypeError, "trajectory_ids: got an entry of type float"),
    "too many step_indices": (from_rows(indices=(0, 1, 2)), ValueError, r"step_indices: got shape \(3,\)"),
    "step_indices float": (from_rows(indices=torch.zeros(2)), TypeError, "step_indices: got torch.float32"),
    "step_indices of strings": (from_rows(indices=("a", "b")), TypeError, "step_indices: got tuple"),
    "valid too short": (from_rows(valid=torch.ones(1)), ValueError, r"valid: got shape \(1,\)"),
    "valid holds 2": (from_rows(valid=torch.tensor([1, 2])), ValueError, "valid: got the value 2"),
    "valid a list": (from_rows(valid=[True, True]), TypeError, "valid: got list"),
    # StepLayout.from_markers
    "token_ids float": (from_markers(_TOKENS), TypeError, "token_ids: got torch.float32"),
    "start empty": (from_markers(start=[]), ValueError, "start: got an empty sequence"),
    "start float": (from_markers(start=[1.5]), TypeError, "start: got torch.float32"),
    "start 2-D": (from_markers(start=torch.ones((1, 2), dtype=torch.int64)), ValueError, r"start: got shape \(1, 2\)"),
    "start a string": (from_markers(start="ab"), TypeError, "start: got str"),
    "end None": (from_markers(end=None), TypeError, "end: got NoneType"),
    "end bool": (from_markers(end=True), TypeError, "end: got bool"),
    "end a list": (from_markers(end=[3]), TypeError, "end: got list"),
    "marker cu_seqlens": (from_markers(cu_seqlens=torch.tensor([0, 12])), ValueError, "cu_seqlens: got it with token_ids"),
}  # fmt: skip


def everything_shared() -> list[torch.Tensor]:
    return [value.clone() for value in (_MASK, _TOKENS, _STEPS, _LAYOUT.step_ids)]


@pytest.mark.parametrize("what", _CALLS)
def test_wrong_call(what):
    call, exception, text = _CALLS[what]
    before = everything_shared()
    with pytest.raises(exception, match=f"^{text}") as caught:
        call()
    assert "expected" in str(caught.value) or "cannot run" in str(caught.value)
    for value, kept in zip(everything_shared(), before, strict=True):
        assert torch.equal(value, kept)


def test_the_calls_are_right_without_their_mistake():
    for call in (
        loss(), mask_loss(), value_loss(), gae(), broadcast(), from_mask(), packed(), from_rows(),
        from_markers(), from_ids(torch.tensor([0, -1, 1])),
        packed(cu_seqlens=torch.tensor([0, 4, 12])), loss(normalizer=torch.tensor(3)),
        loss(config=_KL, ref_log_probs=_TOKENS), loss(config=_BONUS, entropy=_TOKENS),
    ):  # fmt: skip
        assert call() is not None


def test_wrong_calls_do_not_depend_on_the_backend(target):
    """Checks come before dispatch: the same exceptions whichever backend is asked for."""
    if target.device != "cpu":
        pytest.skip("the calls hold CPU tensors")
    for ratio in RATIOS:
        config = StepPOConfig(ratio=ratio)
        with pytest.raises(ValueError, match="^old_log_probs: "):
            loss(old_log_probs=torch.zeros(13), config=config, backend=target.backend)()
        with pytest.raises(ValueError, match="^layout: got the value nan"):
            mask_loss(layout=with_one(_NAN), config=config, backend=target.backend)()
    with pytest.raises(ValueError, match="^cu_seqlens: got 4 after 8"):
        packed(cu_seqlens=torch.tensor([0, 8, 4, 12]), backend=target.backend)()
