"""`steppo_loss_from_logits`: what one forward + backward holds besides the logits, and its time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import steppo_kernels as sk

from ..gates import fused_backend
from ..machine import DEFAULT_THREADS, threads
from ..memory import peak_bytes, peak_resident_bytes
from ..timing import Run, measure, runs
from ..variants import Variant
from ..vocabulary.cases import CONFIG, Shape, logits_case, row_log_probs
from ..vocabulary.variants import (
    EAGER_FLOAT,
    EAGER_HALF,
    IN_PLACE,
    IN_PLACE_SLICE,
    LOGITS_LOSS,
    OF_SLICE,
)

SHAPE = Shape(4, 128, 32, 4)
CASE = str(SHAPE)

# As in `bench_token_log_probs`; ratios are off by what the log-probs are.
_TOLERANCE, _HALF_TOLERANCE = 4e-3, 0.02
_EAGER = (EAGER_HALF, EAGER_FLOAT)


def step_of(variant: Variant) -> Callable[[], Tensor]:
    """Return forward + backward of a variant, which returns the gradient."""
    case = logits_case(SHAPE)
    steps = case.steps

    def loss(logits: Tensor) -> Tensor:
        if variant not in _EAGER:
            return sk.steppo_loss_from_logits(
                logits,
                steps.token_ids,
                steps.old_log_probs,
                steps.advantages,
                steps.layout,
                inplace_backward=variant in (IN_PLACE, IN_PLACE_SLICE),
                config=CONFIG,
                backend=fused_backend(),
            ).loss
        found = row_log_probs(logits.float() if variant == EAGER_FLOAT else logits, steps.token_ids)
        return steps.loss(found.float())

    def of_a_slice() -> Tensor:
        anchor = torch.zeros((), requires_grad=True)
        grads: list[Tensor] = []
        loss(_Model.apply(anchor, _whole(), grads)[:, :-1]).backward()
        return grads[0][:, :-1]

    if variant in (IN_PLACE_SLICE, OF_SLICE):
        return of_a_slice
    return lambda: torch.autograd.grad(loss(case.logits), case.logits)[0]


class _Model(torch.autograd.Function):
    """Returns logits that are there already, and keeps their gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor, grads: list[Tensor]) -> Tensor:
        ctx.grads = grads
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.grads.append(grad)
        return None, None, None


@functools.cache
def _whole() -> Tensor:
    """Return memory for logits with one position more in each row, as a causal LM has them."""
    rows, length, vocabulary = logits_case(SHAPE).logits.shape
    return torch.zeros((rows, length + 1, vocabulary), dtype=logits_case(SHAPE).logits.dtype)


@functools.cache
def _logits() -> Tensor:
    """Return a copy: what is done in place has to be undone."""
    return logits_case(SHAPE).logits.detach().clone()


def reset() -> None:
    """Make the logits what they were."""
    logits_case(SHAPE).logits.detach().copy_(_logits())
    _whole()[:, :-1].copy_(_logits())


@functools.cache
def check(variant: Variant, num_threads: int) -> dict[str, float]:
    """Return error and peak memory of a variant, or raise if the error is too large."""
    case = logits_case(SHAPE)
    reset()
    with threads(num_threads):
        step = step_of(variant)
        grad = step().clone().flatten(0, 1)
        reset()
        peak = peak_bytes(step)
        reset()
        resident = peak_resident_bytes(step)
        reset()
    index, ids = case.steps.index, case.steps.token_ids.view(-1)
    rows = _logits().flatten(0, 1)[index].double().requires_grad_()
    loss = case.steps.loss(row_log_probs(rows, ids[index]))
    (wanted,) = torch.autograd.grad(loss, rows)
    error = float((grad[index] - wanted).norm() / wanted.norm())
    allowed = _HALF_TOLERANCE if variant == EAGER_HALF else _TOLERANCE
    if not error <= allowed:
        raise AssertionError(
            f"{CASE}, {variant}: gradient off by {error:.1e}, allowed is {allowed:.0e}; "
            "nothing is timed"
        )
    if bool(grad[~case.steps.mask.view(-1)].any()):
        raise AssertionError(f"{CASE}, {variant}: a masked token has a gradient")
    info = {"error_gradient": error, "extra_of_logits": peak / case.logits.nbytes}
    if resident is not None:
        info["resident_of_logits"] = resident / case.logits.nbytes
    return info


@pytest.mark.parametrize("run", runs(CASE, LOGITS_LOSS, [DEFAULT_THREADS]), ids=str)
def bench_logits_loss(benchmark: Any, run: Run) -> None:
    """What has to move at least.

    The logits of the action tokens twice, and the gradient of every token.
    """
    case = logits_case(SHAPE)
    info = check(run.variant, run.threads)
    share = SHAPE.action_tokens / SHAPE.tokens
    measure(
        benchmark,
        run,
        step_of(run.variant),
        setup=reset,
        tokens=SHAPE.tokens,
        bytes_to_touch=int(case.logits.nbytes * (1 + 2 * share)),
        info={"suite": "logits_loss", **info},
    )
    reset()
