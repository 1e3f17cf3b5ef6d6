"""`linear_steppo_loss`, forward + backward, next to its matrix products and to other projects'."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from ..machine import DEFAULT_THREADS, threads
from ..memory import peak_resident_bytes
from ..timing import Run, measure, runs
from .cases import Shape
from .heads import available, check, step_of

SHAPE = Shape(8, 128, 32, 8)
CASE = str(SHAPE)
# With the turns in which they take part: those that take long in fewer.
TURNS = {
    "fused": 5,
    "bare products": 5,
    "bare products, kept memory": 5,
    "fused, 2 chunks": 3,
    "fused, twice the products": 3,
    "eager": 3,
    "eager, action tokens": 3,
    "torch.compile": 3,
    "torch.compile, action tokens": 3,
    "CCE torch_compile": 3,
    "F.linear_cross_entropy": 3,
    "F.linear_cross_entropy, chunk": 1,
    "Liger scaled CE": 3,
    "TRL chunked": 2,
    "Liger grpo": 2,
    "Liger grpo, action tokens": 1,
}
# What is compared most closely is called twice a turn, and once before, untimed: a system that
# takes freed memory back from an idle process would let whoever comes first in a turn pay for it.
_ROUNDS = dict.fromkeys(
    (
        "fused",
        "bare products",
        "bare products, kept memory",
        "fused, 2 chunks",
        "fused, twice the products",
        "eager, action tokens",
        "torch.compile, action tokens",
        "CCE torch_compile",
        "F.linear_cross_entropy",
    ),
    2,
)

# More steps, so that 70 % of them can be clipped.
TEN = {"none clipped": Shape(10, 128, 32, 10), "7 of 10 clipped": Shape(10, 128, 32, 3)}
TEN_CASE = str(TEN["none clipped"])


@functools.cache
def _resident(variant: str, num_threads: int) -> dict[str, float]:
    """Return what one forward + backward adds to resident memory, the gradients included."""
    with threads(num_threads):
        step, reset = step_of(SHAPE, variant)
        reset()
        found = peak_resident_bytes(step)
        reset()
    return {} if found is None else {"resident_bytes": found}


@pytest.mark.parametrize(
    "run",
    runs(CASE, {v: TURNS[v] for v in available(tuple(TURNS))}, [DEFAULT_THREADS]),
    ids=str,
)
def bench_linear_loss(benchmark: Any, run: Run) -> None:
    """No step clipped; a quarter of the tokens are action tokens."""
    info = dict(check(SHAPE, run.variant, run.threads))
    if run.variant in ("fused", "eager"):
        info |= _resident(run.variant, run.threads)
    with threads(run.threads):
        step, reset = step_of(SHAPE, run.variant)
        if run.variant in _ROUNDS:
            step()
            reset()
    measure(
        benchmark,
        run,
        step,
        setup=reset,
        tokens=SHAPE.tokens,
        rounds=_ROUNDS.get(run.variant, 1),
        info={"suite": "linear_loss", **info},
    )
    reset()


@pytest.mark.parametrize("run", runs(TEN_CASE, tuple(TEN), [DEFAULT_THREADS]), ids=str)
def bench_linear_loss_clipped(benchmark: Any, run: Run) -> None:
    """What is saved where most steps are clipped."""
    shape = TEN[run.variant]
    info = check(shape, "fused", run.threads)
    with threads(run.threads):
        step, reset = step_of(shape, "fused")
    measure(
        benchmark,
        run,
        step,
        setup=reset,
        tokens=shape.tokens,
        rounds=2,
        info={"suite": "linear_loss_clipped", **info},
    )
    reset()
