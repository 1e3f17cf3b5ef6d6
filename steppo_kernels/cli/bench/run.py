"""Checks the variants of each case, and times those that are right, within a budget."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...backends.choice import Backend
from .case import Case, Outputs, Problem, Size
from .row import COMPILED, EAGER, Row, Status
from .stop import OutOfTime, stopped_at
from .timing import Step, device_seconds, in_turns, peak_bytes
from .trial import Call, Trial, Wrong, exact_answer

# The share of a budget for all but `torch.compile`, which comes last: a compiler that has kept
# nothing from before takes seconds a call.
_FIRST_SHARE = 0.35


def bench(
    cases: Sequence[Case],
    names: Iterable[str],
    device: torch.device,
    *,
    seconds: float,
    on_case: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Measure backends on a device, next to the reference and what `torch.compile` makes of it.

    Args:
        cases: what to measure.
        names: backends that run on `device`.
        device: where the tensors lie.
        seconds: how long to take. What has no time is left out, and its row says so.
        on_case: is told what is being done.

    Returns:
        One row a case, size and variant, in the order of the cases.
    """
    start = time.monotonic()
    deadline = start + seconds
    # What was compiled before would count against dynamo's limit for a function.
    torch.compiler.reset()
    variants = (EAGER, COMPILED, *(name for name in names if name != "reference"))
    contests = [
        _Contest(case, size, device, variants) for case in cases for size in case.sizes[device.type]
    ]
    # The largest size of each case comes first: a short budget is spent on it.
    ordered = sorted(contests, key=lambda one: one.rank, reverse=True)
    # The clock waits for the current device.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        mark = start + _FIRST_SHARE * seconds
        for place, one in enumerate(ordered):
            on_case(str(one))
            turn_end = _share_end(mark, len(ordered) - place)
            one.prepare(deadline)
            one.measure(turn_end, deadline)
        for place, one in enumerate(ordered):
            on_case(f"compiling {one}")
            if one.compile(deadline):
                one.measure(_share_end(deadline, len(ordered) - place), deadline)
    return [row for one in contests for row in one.rows.values()]


def _share_end(end: float, count: int) -> float:
    """Return when the first of so many equal shares of the time until `end` is over."""
    now = time.monotonic()
    return now + (end - now) / count


class _Contest:
    """A case of one size: its variants, and what is known of each.

    Attributes:
        rank: the place of the size among those of the case.
        rows: by variant.
    """

    def __init__(
        self, case: Case, size: Size, device: torch.device, variants: Iterable[str]
    ) -> None:
        self.rank = case.sizes[device.type].index(size)
        self.rows = {
            name: Row(case.operation, case.variant, str(size), str(device), name)
            for name in variants
        }
        self._case, self._size, self._device = case, size, device
        self._problem: Problem | None = None
        # Those that may be timed.
        self._steps: dict[str, Step] = {}

    def __str__(self) -> str:
        return f"{self._case.operation} {self._case.variant} {self._size}"

    def prepare(self, deadline: float) -> None:
        """Draw the problem, and keep the steps of the variants that solve it."""
        if time.monotonic() > deadline:
            self._note_all(status="no time")
            return
        try:
            problem = self._case.draw(self._size, self._device)
            trial, exact = Trial(problem), exact_answer(problem)
        except Exception as error:
            self._note_all(status="failed", note=f"the reference: {_told(error)}")
            return
        self._problem = problem
        dtypes = [str(value.dtype).removeprefix("torch.") for value in problem.inputs.values()]
        self._note_all(dtype=dtypes[0] if dtypes else "")
        for name in self.rows:
            if name != COMPILED:
                backend: Any = "reference" if name == EAGER else name
                self._admit(name, trial, exact, problem.call, backend)

    def compile(self, deadline: float) -> bool:
        """Return whether there is a compiled step now."""
        problem = self._problem
        if problem is None:
            return False
        if problem.why_not_compiled:
            self._note(COMPILED, status="not compiled", note=problem.why_not_compiled)
        elif time.monotonic() > deadline:
            self._note(COMPILED, status="no time")
        else:
            call = torch.compile(problem.plain or problem.call, fullgraph=True, dynamic=False)
            try:
                with stopped_at(deadline):
                    self._admit(COMPILED, Trial(problem), exact_answer(problem), call, "reference")
            except OutOfTime:
                self._note(COMPILED, status="no time")
        return COMPILED in self._steps

    def _admit(self, name: str, trial: Trial, exact: Outputs, call: Call, backend: Backend) -> None:
        """Keep a variant if its answer is right."""
        try:
            error = trial.check(trial.answer(call, backend), exact)
        except Wrong as wrong:
            self._note(name, status="wrong", note=str(wrong))
        except Exception as failure:
            # The compiler of this machine is not this package's to blame.
            status: Status = "not compiled" if name == COMPILED else "failed"
            self._note(name, status=status, note=_told(failure))
        else:
            self._note(name, error=error)
            self._steps[name] = trial.step(call, backend)

    def measure(self, end: float, deadline: float) -> None:
        """Time the variants that are right."""
        if self._problem is None or not self._steps:
            return
        if time.monotonic() > deadline:
            for name in self._steps:
                if self.rows[name].ms is None:
                    self._note(name, status="no time")
            return
        moved = self._problem.moved
        # A machine that is slow, or that others use, gets fewer turns of each.
        late = end + 2.0 * (end - time.monotonic())
        times, raised = in_turns(self._steps, end, min(late, deadline))
        for name, error in raised.items():
            self._note(name, status="failed", note=_told(error))
            del self._steps[name]
        for name, found in times.items():
            self._note(
                name,
                ms=1e3 * found.median,
                iqr_ms=None if found.iqr is None else 1e3 * found.iqr,
                turns=found.turns,
                speedup=found.speedup if EAGER in times else None,
                gb_per_s=None if moved is None else moved / found.median / 1e9,
            )
            if self._device.type == "cuda" and self.rows[name].device_ms is None:
                self._ask_the_gpu(name, found.median)

    def _ask_the_gpu(self, name: str, wall: float) -> None:
        step = self._steps[name]
        try:
            device_ms = 1e3 * device_seconds(step, wall, self._device)
            self._note(name, device_ms=device_ms, peak_mib=peak_bytes(step) / 2**20)
        except Exception as error:
            self._note(name, status="failed", note=_told(error))

    def _note_all(self, **known: Any) -> None:
        for name in self.rows:
            self._note(name, **known)

    def _note(self, name: str, **known: Any) -> None:
        self.rows[name] = replace(self.rows[name], **known)


def _told(error: Exception) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text}"
