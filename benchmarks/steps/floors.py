"""Floors: what a task costs if nothing is computed, timed beside the functions in the same turns.

A floor moves with `torch.add(out=)`, the plainest pass that torch has, as many bytes as the task
must, and allocates the outputs. What has a gradient is a bare `autograd.Function` whose gradient
is fresh zeros. An entry that is gathered from anywhere counts as the cache line that it lies in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import steppo_kernels as sk
from steppo_kernels.outputs import POLICY_METRICS, VALUE_METRICS

_LINE = 64

# What each floor is, by suite, as the page says it.
STATED = {
    "policy_loss": (
        "12 bytes a token (log-probs, old log-probs and a gradient), and a fresh gradient of "
        "zeros, in a bare `autograd.Function` with the same outputs, forward and backward"
    ),
    "value_loss": (
        "144 bytes a step (the cache lines of two values, an index, a return and a length), and a "
        "fresh gradient of zeros, in a bare `autograd.Function` with the same outputs, forward and "
        "backward"
    ),
    "step_gae": (
        "4 bytes a token (its reward) and 104 a step (the cache line of a value, four numbers that "
        "say where it lies and two results), and the allocation of the results"
    ),
    "segment": (
        "a count of the mask on the host, as sizes come before arrays, then the mask and every "
        "array of the layout, and the allocation of these arrays"
    ),
}


class Bare(torch.autograd.Function):
    """The outputs of a loss without their contents; with a pass over memory, also a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        num_metrics: int,
        num_steps: int | None,
        move: Callable[[], object] | None,
    ) -> tuple[Tensor, ...]:
        if move is not None:
            move()
            ctx.save_for_backward(torch.zeros_like(x))
        loss, metrics = x.new_empty(()), x.new_empty(num_metrics, dtype=torch.float64)
        if num_steps is None:
            ctx.mark_non_differentiable(metrics)
            return loss, metrics
        per_step = x.new_empty(num_steps)
        ctx.mark_non_differentiable(metrics, per_step)
        return loss, metrics, per_step

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0], None, None, None


def bare_policy_loss(
    x: Tensor, num_steps: int, move: Callable[[], object] | None = None
) -> tuple[Tensor, ...]:
    """Return a loss, metrics and step log-ratios that hold nothing."""
    found: tuple[Tensor, ...] = Bare.apply(x, len(POLICY_METRICS), num_steps, move)
    return found


def bare_value_loss(x: Tensor, move: Callable[[], object] | None = None) -> tuple[Tensor, ...]:
    """Return a loss and metrics that hold nothing."""
    found: tuple[Tensor, ...] = Bare.apply(x, len(VALUE_METRICS), None, move)
    return found


def bare_gae(x: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return advantages and returns that hold nothing."""
    return x.new_empty(num_steps), x.new_empty(num_steps)


def moving(num_bytes: int) -> Callable[[], Tensor]:
    """Return what reads two tensors and writes a third, of `num_bytes` together."""
    left, right, total = (torch.ones(-(-num_bytes // 12)) for _ in range(3))
    return lambda: torch.add(left, right, out=total)


def policy_floor(x: Tensor, layout: sk.StepLayout) -> Callable[[], Tensor]:
    """Return the floor of `steppo_loss` on log-probs: a loss for a backward pass."""
    move = moving(12 * x.numel())
    return lambda: bare_policy_loss(x, layout.num_steps, move)[0]


def value_floor(x: Tensor, layout: sk.StepLayout) -> Callable[[], Tensor]:
    """Return the floor of `step_value_loss` on values and old values of every token."""
    move = moving((2 * _LINE + 16) * layout.num_steps)
    return lambda: bare_value_loss(x, move)[0]


def gae_floor(rewards: Tensor, layout: sk.StepLayout) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return the floor of `step_gae` on rewards and values of every token."""
    move = moving(4 * rewards.numel() + (_LINE + 40) * layout.num_steps)

    def floor() -> tuple[Tensor, Tensor]:
        move()
        return bare_gae(rewards, layout.num_steps)

    return floor


def segment_floor(mask: Tensor, layout: sk.StepLayout) -> Callable[[], list[Tensor]]:
    """Return the floor of `StepLayout.from_mask`."""
    tensors = list(layout.tensors().values())
    move = moving(mask.nbytes + sum(tensor.nbytes for tensor in tensors))

    def floor() -> list[Tensor]:
        int(mask.count_nonzero())
        made = [torch.empty_like(tensor) for tensor in tensors]
        move()
        return made

    return floor
