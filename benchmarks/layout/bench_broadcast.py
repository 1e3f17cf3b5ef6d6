"""`broadcast_to_tokens`, forward and forward + backward, next to eager PyTorch."""

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
from ..steps.variants import FUSED, PAIR
from ..timing import Run, measure, runs
from ..variants import Variant

CASE = "turns 64x8192"


@functools.cache
def inputs() -> tuple[Tensor, Tensor]:
    """Return one number per step, and the gradient that comes back per token."""
    case = policy_case(CASE)
    generator = torch.Generator().manual_seed(0)
    per_step = torch.randn(case.layout.num_steps, generator=generator).requires_grad_()
    return per_step, torch.randn(case.mask.shape, generator=generator)


def call_of(variant: Variant) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return forward + backward of a variant."""
    per_step, upstream = inputs()
    layout = policy_case(CASE).layout
    backend: Backend = fused_backend() if variant == FUSED else "reference"

    def step() -> tuple[Tensor, Tensor]:
        spread = sk.broadcast_to_tokens(per_step, layout, backend=backend)
        return spread, torch.autograd.grad(spread, per_step, upstream)[0]

    return step


@functools.cache
def gate(variant: Variant, num_threads: int) -> None:
    """Raise unless the variant gives the values exactly and the fp64 gradient."""
    per_step, upstream = inputs()
    layout = policy_case(CASE).layout
    x = per_step.detach().double().requires_grad_()
    wanted = sk.broadcast_to_tokens(x, layout, backend="reference")
    (wanted_grad,) = torch.autograd.grad(wanted, x, upstream.double())
    with threads(num_threads):
        spread, grad = call_of(variant)()
    assert_close(f"broadcast, {variant}", spread, wanted, 0.0)
    assert_close(f"broadcast, {variant}: gradient", grad, wanted_grad, 1e-5)


@pytest.mark.parametrize("run", runs(CASE, PAIR, modes=MODES), ids=str)
def bench_broadcast(benchmark: Any, run: Run) -> None:
    """What it has to move at least.

    Forward the step id of every token and the result; backward the gradient of the action tokens
    and where they stand; per step one entry read and one written.
    """
    gate(run.variant, run.threads)
    layout = policy_case(CASE).layout
    tokens = layout.step_ids.numel()
    measure(
        benchmark,
        run,
        call_of(run.variant),
        tokens=tokens,
        bytes_to_touch=8 * tokens + 12 * layout.num_tokens + 8 * layout.num_steps,
        info={"suite": "broadcast", "steps": layout.num_steps},
    )
