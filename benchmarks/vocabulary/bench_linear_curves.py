"""`linear_steppo_loss` against the share of action tokens, of live steps, and the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest

from ..machine import DEFAULT_THREADS, threads
from ..timing import Run, measure, runs
from .cases import VOCABULARY, Shape
from .heads import available, check, step_of

_SMALLER = 32_768
# By name: what stands on the axis, and the shape there.
CURVES: dict[str, dict[float, Shape]] = {
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
# With the turns in which they take part.
VARIANTS = {
    "share": {"fused": 3, "eager": 2, "eager, action tokens": 2, "Liger grpo": 1},
    "live": {"fused": 3, "fused, twice the products": 2, "eager, action tokens": 2},
    "vocabulary": {"fused": 3, "eager": 2, "eager, action tokens": 2, "Liger grpo": 1},
}

_RUNS = [
    pytest.param(run, name, x, shape, id=f"{name}-{run}")
    for name, places in CURVES.items()
    for x, shape in places.items()
    for run in runs(
        str(shape),
        {v: VARIANTS[name][v] for v in available(tuple(VARIANTS[name]))},
        [DEFAULT_THREADS],
    )
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
        # Those that take long are steady enough.
        rounds=1 if run.variant in ("eager", "Liger grpo") else 3,
        info={"suite": "linear_loss", "curve": name, "x": x, **info},
    )
    reset()
