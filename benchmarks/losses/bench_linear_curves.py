"""`linear_steppo_loss` against the share of action tokens, of live steps, and the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest

from ..machine import DEFAULT_THREADS, threads
from ..timing import Run, measure, runs
from ..vocabulary.cases import VOCABULARY, Shape
from ..vocabulary.heads import available, check, step_of
from ..vocabulary.variants import CURVES

_SMALLER = 32_768
# By name: what stands on the axis, and the shape there.
SHAPES: dict[str, dict[float, Shape]] = {
    # Of 512 tokens.
    "share": {
        round(100 * actions / 64, 1): Shape(8, 64, actions, 8, _SMALLER)
        for actions in (3, 6, 16, 32, 64)
    },
    # Of 16 steps.
    "live": {
        round(100 * live / 16, 1): Shape(16, 32, 32, live, _SMALLER) for live in (0, 4, 8, 12, 16)
    },
    "vocabulary": {size: Shape(8, 64, 16, 8, size) for size in (4096, 16_384, 65_536, VOCABULARY)},
}
_RUNS = [
    pytest.param(run, name, x, shape, id=f"{name}-{run}")
    for name, places in SHAPES.items()
    for x, shape in places.items()
    for run in runs(str(shape), available(CURVES[name]), [DEFAULT_THREADS])
]


@pytest.mark.parametrize(("run", "name", "x", "shape"), _RUNS)
def bench_linear_curves(benchmark: Any, run: Run, name: str, x: float, shape: Shape) -> None:
    """Time and memory."""
    info = check(shape, run.variant, run.threads)
    with threads(run.threads):
        step, reset = step_of(shape, run.variant)
    measure(
        benchmark,
        run,
        step,
        setup=reset,
        tokens=shape.tokens,
        info={"suite": "linear_loss", "curve": name, "x": x, **info},
    )
    reset()
