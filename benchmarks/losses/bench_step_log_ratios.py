"""`step_log_ratios`, forward + backward, next to eager PyTorch."""

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
from ..machine import threads
from ..modes import MODES
from ..steps.cases import policy_case
from ..steps.variants import EAGER, FUSED, PAIR
from ..timing import Run, measure, runs
from ..variants import Variant

CASE = "turns 64x8192"


@functools.cache
def upstream() -> Tensor:
    """Return the gradient that comes back per step."""
    return torch.randn(
        policy_case(CASE).layout.num_steps, generator=torch.Generator().manual_seed(0)
    )


def call_of(
    variant: Variant, dtype: torch.dtype = torch.float32
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return forward + backward of a variant."""
    case = policy_case(CASE)
    backend: Backend = fused_backend() if variant == FUSED else "reference"
    x = case.log_probs.detach().to(dtype).requires_grad_()
    old, back = case.old_log_probs.to(dtype), upstream().to(dtype)

    def step() -> tuple[Tensor, Tensor]:
        found = sk.step_log_ratios(x, old, case.layout, backend=backend)
        return found, torch.autograd.grad(found, x, back)[0]

    return step


@functools.cache
def gate(variant: Variant, num_threads: int) -> None:
    """Raise unless the variant gives the fp64 values and gradient."""
    with threads(num_threads):
        found, grad = call_of(variant)()
    wanted, wanted_grad = call_of(EAGER, torch.float64)()
    assert_close(f"step log-ratios, {variant}", found, wanted, 1e-4)
    assert_close(f"step log-ratios, {variant}: gradient", grad, wanted_grad, 1e-5)


@pytest.mark.parametrize("run", runs(CASE, PAIR, modes=MODES), ids=str)
def bench_step_log_ratios(benchmark: Any, run: Run) -> None:
    """Speed.

    What it has to move at least: two log-probs and the index of each action token, two numbers and
    an offset a step, and the gradient of every token, written.
    """
    gate(run.variant, run.threads)
    layout = policy_case(CASE).layout
    tokens = layout.step_ids.numel()
    measure(
        benchmark,
        run,
        call_of(run.variant),
        tokens=tokens,
        bytes_to_touch=16 * layout.num_tokens + 16 * layout.num_steps + 4 * tokens,
        info={"suite": "step_log_ratios", "steps": layout.num_steps},
    )
