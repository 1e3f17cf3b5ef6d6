"""What the CPU does between a public call on backend cuda and its launches, without a GPU.

The kernels are those that tests build for the host, with launches that do nothing, and the tensors
are on the CPU: what is left is Python, the checks, the allocation of the outputs and the bindings.
On a GPU the query of the current stream and the launches themselves come on top.

    STEPPO_CUDA_ON_HOST=$(python tests/cuda_on_host.py) python -m benchmarks.launch_cost
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable

from steppo_kernels.backends import choice

from .losses.bench_overhead import BATCH, FUNCTIONS, call_of
from .machine import machine
from .steps.variants import BARE, FUSED

_ROUNDS = 3000


def in_turns(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median microseconds of calls that take turns."""
    times: dict[str, list[int]] = {name: [] for name in calls}
    for turn in range(_ROUNDS + _ROUNDS // 10):
        for name, call in calls.items():
            begin = time.perf_counter_ns()
            call()
            took = time.perf_counter_ns() - begin
            if turn >= _ROUNDS // 10:
                times[name].append(took)
    return {name: statistics.median(each) / 1e3 for name, each in times.items()}


def table() -> list[str]:
    """Return the lines of the table."""
    path = os.environ.get("STEPPO_CUDA_ON_HOST", "")
    if not choice.cuda_on_host():
        raise SystemExit(f"STEPPO_CUDA_ON_HOST: got {path!r}, expected what the docstring says")
    ctypes.CDLL(path).order_of_threads(ctypes.c_uint64(0), 0)
    here = machine()
    lines = [
        f"{here['cpu']}, torch {here['torch']}, {here['date']}, load {here['load']}; a batch of "
        f"{BATCH}, medians of {_ROUNDS} turns",
        "",
        "| forward call | us | a bare `autograd.Function` (`step_gae`: two tensors) | beyond |",
        "|---|---|---|---|",
    ]
    for function in FUNCTIONS:
        fused = call_of(function, FUSED)
        took = in_turns({"cuda": lambda call=fused: call("cuda"), "bare": call_of(function, BARE)})
        beyond = took["cuda"] - took["bare"]
        lines.append(f"| `{function}` | {took['cuda']:.1f} | {took['bare']:.1f} | {beyond:.1f} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
