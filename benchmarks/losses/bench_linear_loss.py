"""`linear_steppo_loss`, forward + backward, next to its matrix products and to other projects'."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from ..machine import DEFAULT_THREADS, threads
from ..memory import peak_resident_bytes
from ..timing import Run, measure, runs
from ..variants import Variant
from ..vocabulary.cases import Shape
from ..vocabulary.heads import available, check, step_of
from ..vocabulary.variants import EAGER, FUSED, LINEAR_LOSS, MOST_CLIPPED, NONE_CLIPPED

SHAPE = Shape(8, 128, 32, 8)
CASE = str(SHAPE)
# More steps, so that 70 % of them can be clipped.
TEN = {NONE_CLIPPED: Shape(10, 128, 32, 10), MOST_CLIPPED: Shape(10, 128, 32, 3)}
TEN_CASE = str(TEN[NONE_CLIPPED])


@functools.cache
def _resident(variant: Variant, num_threads: int) -> dict[str, float]:
    """Return what one forward + backward adds to resident memory, the gradients included."""
    with threads(num_threads):
        step, reset = step_of(SHAPE, variant)
        reset()
        found = peak_resident_bytes(step)
        reset()
    return {} if found is None else {"resident_bytes": found}


@pytest.mark.parametrize(
    "run",
    runs(CASE, available(LINEAR_LOSS), [DEFAULT_THREADS]),
    ids=str,
)
def bench_linear_loss(benchmark: Any, run: Run) -> None:
    """No step clipped; a quarter of the tokens are action tokens."""
    info = dict(check(SHAPE, run.variant, run.threads))
    if run.variant in (FUSED, EAGER):
        info |= _resident(run.variant, run.threads)
    with threads(run.threads):
        step, reset = step_of(SHAPE, run.variant)
        if run.variant.rounds != 1:
            step()
            reset()
    measure(
        benchmark,
        run,
        step,
        setup=reset,
        tokens=SHAPE.tokens,
        info={"suite": "linear_loss", **info},
    )
    reset()


@pytest.mark.parametrize("run", runs(TEN_CASE, TEN, [DEFAULT_THREADS]), ids=str)
def bench_linear_loss_clipped(benchmark: Any, run: Run) -> None:
    """What is saved where most steps are clipped."""
    shape = TEN[run.variant]
    info = check(shape, FUSED, run.threads)
    with threads(run.threads):
        step, reset = step_of(shape, FUSED)
    measure(
        benchmark,
        run,
        step,
        setup=reset,
        tokens=shape.tokens,
        info={"suite": "linear_loss_clipped", **info},
    )
    reset()
