"""`rollout_weights` per token and per step, next to eager PyTorch and verl's rollout correction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import steppo_kernels as sk
from steppo_kernels.backends.choice import Backend

from ..gates import assert_close, fused_backend
from ..machine import DEFAULT_THREADS
from ..modes import MODES
from ..steps import peers
from ..steps.cases import policy_case
from ..steps.variants import EAGER, FUSED, PAIR, ROLLOUT_WEIGHTS, VERL_WEIGHTS
from ..timing import Run, measure, runs
from ..variants import Variant

BATCH = "turns 64x8192"
TOKEN, STEP = f"{BATCH}, token", f"{BATCH}, step"
# The usual upper bound.
_HIGH = 2.0


@functools.cache
def rollout_log_probs() -> Tensor:
    """Return what the engine says of the same policy: other rounding, some of it coarse."""
    old = policy_case(BATCH).old_log_probs
    noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
    return old + 0.3 * noise**3


def call_of(
    case: str, variant: Variant, dtype: torch.dtype = torch.float32
) -> Callable[[], Tensor]:
    """Return the call that a variant makes: weights of the token shape, or per step."""
    batch = policy_case(BATCH)
    old, rollout = batch.old_log_probs.to(dtype), rollout_log_probs().to(dtype)
    if variant == VERL_WEIGHTS:
        # verl's trainer hands the mask on as int64.
        integers = batch.mask.to(torch.int64)
        weights = peers.verl_rollout_weights()
        return lambda: weights(old - rollout, integers, "token", _HIGH)[0]
    backend: Backend = fused_backend() if variant == FUSED else "reference"
    level = "token" if case == TOKEN else "step"
    return lambda: (
        sk.rollout_weights(
            old, rollout, batch.layout, level=level, high=_HIGH, backend=backend
        ).weights
    )


@functools.cache
def gate(case: str, variant: Variant) -> None:
    """Raise unless the variant gives the fp64 weights of steps and action tokens."""
    found, wanted = call_of(case, variant)(), call_of(case, EAGER, torch.float64)()
    if case == TOKEN:
        mask = policy_case(BATCH).mask
        found, wanted = found.view(mask.shape)[mask], wanted.view(mask.shape)[mask]
    assert_close(f"rollout weights, {case}, {variant}", found, wanted, 1e-5)


@pytest.mark.parametrize(
    "run",
    [
        *runs(TOKEN, peers.available(ROLLOUT_WEIGHTS), (DEFAULT_THREADS,), modes=MODES),
        *runs(STEP, PAIR, (DEFAULT_THREADS,), modes=MODES),
    ],
    ids=str,
)
def bench_rollout_weights(benchmark: Any, run: Run) -> None:
    """Speed.

    What it has to move at least: two log-probs and the index of each action token, and the weights
    of all tokens, written; or an offset and a weight a step.
    """
    gate(run.case, run.variant)
    layout = policy_case(BATCH).layout
    tokens = layout.step_ids.numel()
    written = 4 * tokens if run.case == TOKEN else 12 * layout.num_steps
    measure(
        benchmark,
        run,
        call_of(run.case, run.variant),
        tokens=tokens,
        bytes_to_touch=16 * layout.num_tokens + written,
        info={"suite": "rollout_weights", "steps": layout.num_steps},
    )
