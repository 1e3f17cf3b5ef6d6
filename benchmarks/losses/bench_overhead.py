"""What a call costs beyond its work: a small batch, next to calls that only make the outputs.

Losses are timed forward, with a gradient wanted, next to a bare `autograd.Function` with as many
outputs; `step_gae` next to the allocation of its two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import steppo_kernels as sk

from ..gates import assert_close, fused_backend
from ..machine import DEFAULT_THREADS
from ..modes import MODES
from ..steps.cases import policy_case
from ..steps.floors import bare_gae, bare_policy_loss, bare_value_loss
from ..steps.variants import BARE, FUSED, OVERHEAD
from ..timing import Run, measure, runs
from ..variants import Variant

BATCH = "rows 8x64"
OF_MASK = "steppo_loss of a mask"
FUNCTIONS = ("steppo_loss", OF_MASK, "steppo_loss with bounds", "step_gae", "step_value_loss")
# A call takes microseconds.
_ROUNDS = 3000

Call = Callable[..., Any]


def call_of(function: str, variant: Variant, dtype: torch.dtype = torch.float32) -> Call:
    """Return the call that a variant makes; it may be given another backend than the fused."""
    case = policy_case(BATCH)
    layout, fused = case.layout, fused_backend()
    x = case.log_probs.detach().to(dtype).requires_grad_()
    old, advantages = case.old_log_probs.to(dtype), case.advantages.to(dtype)
    of_tokens = case.token_advantages.to(dtype)
    values, steps = x.detach(), layout.num_steps
    bounds = {"clip_low": torch.full_like(advantages, 0.2)}
    bounds["clip_high"] = bounds["clip_low"] + 0.1
    calls: dict[tuple[str, Variant], Call] = {
        ("steppo_loss", FUSED): lambda backend=fused: sk.steppo_loss(
            x, old, advantages, layout, backend=backend
        ),
        ("steppo_loss", BARE): lambda: bare_policy_loss(x, steps),
        (OF_MASK, FUSED): lambda backend=fused: sk.steppo_loss(
            x, old, of_tokens, case.mask, backend=backend
        ),
        (OF_MASK, BARE): lambda: bare_policy_loss(x, steps),
        ("steppo_loss with bounds", FUSED): lambda backend=fused: sk.steppo_loss(
            x, old, advantages, layout, **bounds, backend=backend
        ),
        ("steppo_loss with bounds", BARE): lambda: bare_policy_loss(x, steps),
        ("step_gae", FUSED): lambda backend=fused: sk.step_gae(
            old, values, layout, backend=backend
        ),
        ("step_gae", BARE): lambda: bare_gae(values, steps),
        ("step_value_loss", FUSED): lambda backend=fused: sk.step_value_loss(
            x, advantages, layout, old_values=old, backend=backend
        ),
        ("step_value_loss", BARE): lambda: bare_value_loss(x),
    }
    return calls[function, variant]


@functools.cache
def gate(function: str) -> None:
    """Raise unless the fused call gives the fp64 reference."""
    got = call_of(function, FUSED)()
    wanted = call_of(function, FUSED, torch.float64)("reference")
    if function == "step_gae":
        assert_close("step_gae: advantages", got.advantages, wanted.advantages, 1e-5)
    else:
        assert_close(f"{function}: loss", got.loss, wanted.loss, 1e-5)


@pytest.mark.parametrize(
    "run",
    [
        run
        for function in FUNCTIONS
        for run in runs(f"{function}, {BATCH}", OVERHEAD, (DEFAULT_THREADS,), modes=MODES)
    ],
    ids=str,
)
def bench_overhead(benchmark: Any, run: Run) -> None:
    """Time a forward call."""
    function = run.case.split(",")[0]
    gate(function)
    measure(
        benchmark,
        run,
        call_of(function, run.variant),
        tokens=policy_case(BATCH).tokens,
        info={"suite": "overhead"},
        max_rounds=_ROUNDS,
    )
