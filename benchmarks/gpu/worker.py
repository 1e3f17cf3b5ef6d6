"""Measures cases in one process and writes a line of JSON for everything that it finds.

A kernel that goes astray takes the process with it, or leaves a GPU that answers nothing more in
it. Before each call that may do so the process writes down what it is about to call:
`benchmarks.gpu.measure` starts another process, without that variant.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from ..variants import Variant
from .cases import SIZES, cases
from .clock import HostClock, Turn, clock_of
from .problem import Case, Problem, free_bytes
from .variants import OURS, SLOW_TO_PREPARE

TURNS = 3
# Of the time that is given, the share after which nothing is begun that is slow to prepare.
_SHARE_FOR_SLOW = 0.7
LOST = 3

# What is copied, and multiplied, to know what the device can do: bytes, and rows of a matrix.
_COPY = {"cuda": 2**30, "cpu": 2**26}
_PRODUCT = {"cuda": 8192, "cpu": 256}
# Of the free memory of a GPU, the share that a copy may take.
_COPY_SHARE = 4


class DeviceLost(Exception):
    """The GPU answers nothing more in this process."""


class Worker:
    """Measures cases one after the other."""

    def __init__(self, device: torch.device, lines: TextIO, seconds: float) -> None:
        """Take a device, where to write, and the time until which cases are begun."""
        self._device, self._lines = device, lines
        now = time.monotonic()
        self._end, self._last_slow = now + seconds, now + _SHARE_FOR_SLOW * seconds
        self._clock: HostClock = clock_of(device)
        # Garbage is collected before every turn, and need not be looked for in all of torch.
        gc.collect()
        gc.freeze()

    def rates(self) -> None:
        """Measure how fast the device copies and multiplies."""
        kind, free = self._device.type, free_bytes(self._device)
        size = _COPY[kind] if free is None else min(_COPY[kind], free // _COPY_SHARE)
        source = torch.ones(size // 4, device=self._device)
        target = torch.empty_like(source)
        copied = self._clock.rate(lambda: target.copy_(source), 2.0 * source.nbytes)
        rows = _PRODUCT[kind]
        left, right = torch.randn((2, rows, rows), device=self._device).to(torch.bfloat16)
        product = self._clock.rate(lambda: torch.mm(left, right), 2.0 * rows**3)
        self._write("rates", copy=copied, product=product)

    def run(self, case: Case, without: dict[str, str]) -> None:
        """Measure a case, without some of its variants for the reasons given.

        Raises:
            DeviceLost: a variant was its end; it is written down.
        """
        name = case.name._asdict()
        if time.monotonic() > self._end:
            self._write("not begun", **name)
            return
        self._write("begin", **name)
        problem = self._tried(case, None, lambda: case.make(self._device))
        if problem is not None:
            self._measure(case, problem, without)
            del problem
        self._write("end", **name)
        self._give_back()

    def _measure(self, case: Case, problem: Problem, without: dict[str, str]) -> None:
        for variant, why in problem.left_out.items():
            self._leave_out(case, variant, why)
        rows: dict[Variant, dict[str, Any]] = {}
        for variant in problem.calls:
            if why := without.get(variant.name):
                # What went wrong with one of ours is written down as a failure already.
                if variant not in OURS:
                    self._leave_out(case, variant, why)
            elif variant not in OURS and time.monotonic() > self._end_of(variant):
                self._leave_out(case, variant, "no time was left to prepare it")
            else:
                found = self._tried(case, variant, lambda v=variant: self._prepared(problem, v))
                if found is not None:
                    rows[variant] = found
        turns: dict[Variant, list[Turn]] = {variant: [] for variant in rows}
        for turn in range(TURNS):
            if turn and time.monotonic() > self._end:
                break
            for variant in list(rows):
                call = problem.calls[variant]
                found = self._tried(
                    case, variant, lambda call=call: self._clock.turn(call, problem.reset)
                )
                if found is None:
                    del rows[variant]
                else:
                    turns[variant].append(found)
        for variant, row in rows.items():
            of_device = [one.device for one in turns[variant]]
            self._write(
                "row",
                **case.name._asdict(),
                variant=variant.name,
                device=None if None in of_device else of_device,
                wall=[one.wall for one in turns[variant]],
                # A floor leaves out what the task has to move.
                moved=None if variant in problem.floors else problem.moved,
                operations=problem.operations,
                smaller=problem.smaller,
                **row,
            )

    def _end_of(self, variant: Variant) -> float:
        """Return the time after which a variant is not prepared any more."""
        return self._last_slow if variant in SLOW_TO_PREPARE else self._end

    def _prepared(self, problem: Problem, variant: Variant) -> dict[str, Any]:
        """Check a variant, call it once more, and return what is not a time of a turn."""
        call, reset = problem.calls[variant], problem.reset
        if reset is not None:
            reset()
        outputs = call()
        error = None if variant in problem.floors else problem.check(variant, outputs)
        del outputs
        if reset is not None:
            reset()
        call()
        launches = self._clock.launches(call, reset)
        return {
            "error": error,
            "peak_bytes": self._clock.peak(call, reset),
            "launches": None if launches is None else launches.kernels,
            "kernel_seconds": None if launches is None else launches.seconds,
            "copies": None if launches is None else launches.copies,
        }

    def _tried(self, case: Case, variant: Variant | None, make: Callable[[], Any]) -> Any:
        """Return what is made; if that raises, write it down and return None."""
        label = None if variant is None else variant.name
        self._write("call", **case.name._asdict(), variant=label)
        try:
            found = make()
            self._clock.settle()
        except Exception as error:
            why = _sentence(error)
            lost = self._is_lost()
            if variant is None or variant in OURS:
                self._write("failure", **case.name._asdict(), variant=label, why=why)
            elif not lost:
                self._leave_out(case, variant, why)
            if lost:
                self._write("lost", **case.name._asdict(), variant=label, why=why)
                raise DeviceLost(why) from error
        else:
            return found
        # The error held what the call had made.
        self._give_back()
        return None

    def _give_back(self) -> None:
        """Give memory that is not in use back to the GPU."""
        if "torch._dynamo" in sys.modules:
            # What was compiled holds on to what it was compiled for.
            torch.compiler.reset()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _is_lost(self) -> bool:
        try:
            self._clock.settle()
        except Exception:
            return True
        return False

    def _leave_out(self, case: Case, variant: Variant, why: str) -> None:
        self._write("left out", **case.name._asdict(), variant=variant.name, why=why)

    def _write(self, kind: str, **entries: Any) -> None:
        self._lines.write(json.dumps({"kind": kind, **entries}) + "\n")
        self._lines.flush()


def _sentence(error: Exception) -> str:
    """Return an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", required=True)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--lines", type=Path, required=True, help="where lines are appended")
    parser.add_argument("--plan", required=True, help="JSON: the cases by number, and what each is")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    every = cases(options.size)
    with options.lines.open("a") as lines:
        worker = Worker(device, lines, options.seconds)
        plan = json.loads(options.plan)
        if plan["rates"]:
            worker.rates()
        for number, without in plan["cases"]:
            try:
                worker.run(every[number], without)
            except DeviceLost:
                return LOST
    return 0


if __name__ == "__main__":
    sys.exit(main())
