"""`StepLayout`: what it costs to build one, from masks and from rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import steppo_kernels as sk
from steppo_kernels.backends.choice import Backend

from ..gates import fused_backend
from ..losses.bench_gae import row_case
from ..machine import DEFAULT_THREADS, threads
from ..modes import MODES
from ..steps.cases import policy_case
from ..steps.floors import segment_floor
from ..steps.variants import EAGER, FLOOR, FUSED, PAIR
from ..timing import GROWTH_TURNS, Run, measure, runs
from ..variants import Variant

MASK, ROWS = "turns 64x8192", "rows 2688x512"
GROWTH = [f"turns {rows}x1250" for rows in (8, 24, 80, 240, 800, 2400, 8000)]


def build(case: str, variant: Variant) -> Callable[[], sk.StepLayout]:
    """Return the call that a variant makes on a case."""
    backend: Backend = fused_backend() if variant == FUSED else "reference"
    if case == ROWS:
        rows = row_case()
        indices = torch.from_numpy(rows["step_indices"])
        return lambda: sk.StepLayout.from_rows(
            rows["mask"], rows["trajectory_uids"], indices, backend=backend
        )
    mask = policy_case(case).mask
    return lambda: sk.StepLayout.from_mask(mask, backend=backend)


@functools.cache
def floor() -> Callable[[], list[Tensor]]:
    """Return the floor of the masks."""
    return segment_floor(policy_case(MASK).mask, build(MASK, FUSED)())


@functools.cache
def gate(case: str, variant: Variant, num_threads: int) -> None:
    """Raise unless the variant gives the reference's layout, entry by entry."""
    if variant == FLOOR:
        return
    wanted = build(case, EAGER)()
    with threads(num_threads):
        got = build(case, variant)()
    for name, expected in wanted.tensors().items():
        if not torch.equal(got.tensors()[name], expected):
            raise AssertionError(f"{case}, {variant}: {name} differs; nothing is timed")


@pytest.mark.parametrize(
    "run", [*runs(MASK, (*PAIR, FLOOR), modes=MODES), *runs(ROWS, PAIR, modes=MODES)], ids=str
)
def bench_segment(benchmark: Any, run: Run) -> None:
    """Speed."""
    _run(benchmark, run, {})


@pytest.mark.parametrize(
    "run",
    [r for case in GROWTH for r in runs(case, [FUSED], (DEFAULT_THREADS,), GROWTH_TURNS, MODES)],
    ids=str,
)
def bench_segment_growth(benchmark: Any, run: Run) -> None:
    """Cost against tokens."""
    _run(benchmark, run, {"growth": True})


def _run(benchmark: Any, run: Run, info: dict[str, Any]) -> None:
    gate(run.case, run.variant, run.threads)
    layout = build(run.case, FUSED)()
    call = floor() if run.variant == FLOOR else build(run.case, run.variant)
    element = row_case()["mask"].element_size() if run.case == ROWS else 1
    tokens = layout.step_ids.numel()
    written = sum(
        value.nbytes
        for name, value in layout.tensors().items()
        if not (run.case == ROWS and name == "row_offsets")
    )
    measure(
        benchmark,
        run,
        call,
        tokens=tokens,
        bytes_to_touch=0 if "growth" in info else element * tokens + written,
        info={"suite": "segment", "steps": layout.num_steps, **info},
    )
