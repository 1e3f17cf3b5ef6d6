"""Calls of every public function that are right, and changes that make them wrong."""

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
    rollout_weights,
    step_gae,
    step_log_ratios,
    step_value_loss,
    steppo_loss,
    steppo_loss_from_logits,
    token_log_probs,
)

MASK = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 1, 0, 0]], dtype=torch.bool)
LAYOUT = StepLayout.from_mask(MASK, backend="reference")
TOKENS = torch.linspace(-1.0, -0.1, 12).reshape(2, 6)
STEPS = torch.linspace(-1.0, 1.0, 4)
IDS = torch.arange(12).reshape(2, 6)
LOGITS = torch.linspace(-2.0, 2.0, 60).reshape(2, 6, 5)
TARGETS = IDS % 5
HIDDEN = torch.linspace(-1.0, 1.0, 36).reshape(2, 6, 3)
WEIGHT = torch.linspace(-1.0, 1.0, 15).reshape(5, 3)
CENTERED = StepPOConfig(ratio="centered")
SOFT = StepPOConfig(surrogate="soft")
QUADRATIC = StepPOConfig(surrogate="quadratic")
NAN = float("nan")


def loss(**changed: Any) -> Callable[[], object]:
    arguments = {
        "log_probs": TOKENS,
        "old_log_probs": TOKENS,
        "advantages": STEPS,
        "layout": LAYOUT,
        **changed,
    }
    return lambda: steppo_loss(**arguments)


def mask_loss(**changed: Any) -> Callable[[], object]:
    return loss(**{"advantages": TOKENS, "layout": MASK, **changed})


def log_probs(**changed: Any) -> Callable[[], object]:
    arguments = {"logits": LOGITS, "token_ids": TARGETS, **changed}
    return lambda: token_log_probs(**arguments)


def logits_loss(**changed: Any) -> Callable[[], object]:
    arguments = {
        "logits": LOGITS,
        "token_ids": TARGETS,
        "old_log_probs": TOKENS,
        "advantages": STEPS,
        "layout": LAYOUT,
        **changed,
    }
    return lambda: steppo_loss_from_logits(**arguments)


def value_loss(**changed: Any) -> Callable[[], object]:
    arguments = {"values": TOKENS, "returns": STEPS, "layout": LAYOUT, **changed}
    return lambda: step_value_loss(**arguments)


def gae(**changed: Any) -> Callable[[], object]:
    arguments = {"rewards": TOKENS, "values": TOKENS, "layout": LAYOUT, **changed}
    return lambda: step_gae(**arguments)


def broadcast(**changed: Any) -> Callable[[], object]:
    return lambda: broadcast_to_tokens(**{"per_step": STEPS, "layout": LAYOUT, **changed})


def from_mask(mask: Any = MASK, **options: Any) -> Callable[[], object]:
    return lambda: StepLayout.from_mask(mask, **options)


def from_ids(ids: Any, **options: Any) -> Callable[[], object]:
    return lambda: StepLayout.from_step_ids(ids, **options)


def from_rows(
    mask: Any = MASK, ids: Any = (0, 0), indices: Any = (0, 1), **options: Any
) -> Callable[[], object]:
    return lambda: StepLayout.from_rows(mask, ids, indices, **options)


def from_markers(
    ids: Any = IDS, start: Any = (1, 2), end: Any = 3, **options: Any
) -> Callable[[], object]:
    return lambda: StepLayout.from_markers(ids, start, end, **options)


def packed(**options: Any) -> Callable[[], object]:
    """A packed mask of 12 tokens."""
    return from_mask(MASK.reshape(-1), **options)


def with_one(value: float) -> torch.Tensor:
    """A float mask with one entry that is not 0 or 1."""
    mask = MASK.float()
    mask[1, 4] = value
    return mask


def linear_log_probs(**changed: Any) -> Callable[[], object]:
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "token_ids": TARGETS, **changed}
    return lambda: linear_token_log_probs(**arguments)


def linear_loss(**changed: Any) -> Callable[[], object]:
    arguments = {
        "hidden": HIDDEN,
        "weight": WEIGHT,
        "token_ids": TARGETS,
        "old_log_probs": TOKENS,
        "advantages": STEPS,
        "layout": LAYOUT,
        **changed,
    }
    return lambda: linear_steppo_loss(**arguments)


def with_target(value: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Tokens of which one, an action token, is `value`."""
    ids = TARGETS.to(dtype, copy=True)
    ids[0, 4] = value
    return ids


def with_temperature(value: float) -> torch.Tensor:
    temperatures = torch.ones(2, 6)
    temperatures[0, 4] = value
    return temperatures


def log_ratios(**changed: Any) -> Callable[[], object]:
    arguments = {"log_probs": TOKENS, "old_log_probs": TOKENS, "layout": LAYOUT, **changed}
    return lambda: step_log_ratios(**arguments)


def rollout(**changed: Any) -> Callable[[], object]:
    arguments = {"old_log_probs": TOKENS, "rollout_log_probs": TOKENS, "layout": LAYOUT, **changed}
    return lambda: rollout_weights(**arguments)


def of_config(**values: Any) -> Callable[[], object]:
    return lambda: StepPOConfig(**values)


def of_token(value: float, position: int = 4) -> torch.Tensor:
    """Numbers of the tokens, of which the action token at `position` of row 0 has this."""
    numbers = TOKENS.clone()
    numbers[0, position] = value
    return numbers


def of_step(value: float) -> torch.Tensor:
    """A bound for each step, of which the second is `value`."""
    return torch.tensor([0.1, value, 0.2, 0.3])


META = TOKENS.to("meta")
KL = StepPOConfig(kl_coef=0.1)
BONUS = StepPOConfig(entropy_coef=0.1)


def everything_shared() -> list[torch.Tensor]:
    return [value.clone() for value in (MASK, TOKENS, STEPS, LOGITS, TARGETS, LAYOUT.step_ids)]


def check(exception: type[Exception], text: str, call: Callable[[], object]) -> None:
    """The call raises, says what was expected, and changes nothing."""
    before = everything_shared()
    with pytest.raises(exception, match=f"^{re.escape(text)}") as caught:
        call()
    assert "expected" in str(caught.value) or "cannot run" in str(caught.value)
    for value, kept in zip(everything_shared(), before, strict=True):
        assert torch.equal(value, kept)
