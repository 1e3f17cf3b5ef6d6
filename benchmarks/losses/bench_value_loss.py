"""`step_value_loss`, forward + backward, next to eager PyTorch and the floor."""

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
from ..steps.floors import value_floor
from ..steps.variants import FLOOR, FUSED, PAIR
from ..timing import Run, measure, runs
from ..variants import Variant

CASE = "turns 64x8192"


@functools.cache
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return values and old values of every token, and the returns of the steps."""
    case = policy_case(CASE)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(case.mask.shape, generator=generator)
    # A tenth of the values has moved by more than the clip range of 0.5.
    old = values + 0.3 * torch.randn(case.mask.shape, generator=generator)
    returns = torch.randn(case.layout.num_steps, generator=generator)
    return values.requires_grad_(), old, returns


def loss_of(variant: Variant) -> Callable[[], Tensor]:
    """Return the call that a variant makes."""
    values, old, returns = inputs()
    layout = policy_case(CASE).layout
    if variant == FLOOR:
        return value_floor(values, layout)
    backend: Backend = fused_backend() if variant == FUSED else "reference"
    return lambda: sk.step_value_loss(values, returns, layout, old_values=old, backend=backend).loss


@functools.cache
def gate(variant: Variant, num_threads: int) -> None:
    """Raise unless the variant gives the fp64 loss and gradient."""
    if variant == FLOOR:
        return
    values, old, returns = inputs()
    x = values.detach().double().requires_grad_()
    wanted = sk.step_value_loss(
        x, returns.double(), policy_case(CASE).layout, old_values=old.double(), backend="reference"
    ).loss
    (wanted_grad,) = torch.autograd.grad(wanted, x)
    with threads(num_threads):
        loss = loss_of(variant)()
        (grad,) = torch.autograd.grad(loss, values)
    assert_close(f"value loss, {variant}", loss, wanted, 1e-5)
    assert_close(f"value loss, {variant}: gradient", grad, wanted_grad, 1e-5)


@pytest.mark.parametrize("run", runs(CASE, (*PAIR, FLOOR), modes=MODES), ids=str)
def bench_value_loss(benchmark: Any, run: Run) -> None:
    """Speed.

    What it has to move at least: per step two values, where they stand, the return and the length;
    and the gradient of every token, written.
    """
    gate(run.variant, run.threads)
    values, _, _ = inputs()
    steps = policy_case(CASE).layout.num_steps
    call = loss_of(run.variant)

    def reset() -> None:
        values.grad = None

    measure(
        benchmark,
        run,
        lambda: call().backward(),
        setup=reset,
        tokens=values.numel(),
        bytes_to_touch=24 * steps + 4 * values.numel(),
        info={"suite": "value_loss", "steps": steps},
    )
    reset()
