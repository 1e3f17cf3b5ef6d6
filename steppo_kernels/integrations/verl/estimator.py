"""The advantage estimator `step_gae`, which stands for what the trainer computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

NAME = "step_gae"

_TRAINER_FOLLOWS: ContextVar[bool] = ContextVar("trainer_follows", default=False)


@contextmanager
def trainer_follows() -> Iterator[None]:
    """Let `step_gae` return zeros, which the trainer then replaces."""
    token = _TRAINER_FOLLOWS.set(True)
    try:
        yield
    finally:
        _TRAINER_FOLLOWS.reset(token)


@register_adv_est(NAME)
def step_gae(token_level_rewards: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """Return zeros in the place of advantages and returns, inside of a trainer that computes them.

    verl hands estimators neither values nor the trajectory and index of a row, so that no estimator
    can compute GAE over steps.

    Raises:
        RuntimeError: the trainer is none that computes them.
    """
    if not _TRAINER_FOLLOWS.get():
        raise RuntimeError(
            f"algorithm.adv_estimator: got {NAME!r} in a trainer that does not compute it, "
            "expected trainer.v1.trainer_mode=steppo_sync"
        )
    return torch.zeros_like(token_level_rewards), torch.zeros_like(token_level_rewards)
