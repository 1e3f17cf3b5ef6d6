"""The machine that is measured: what it is, its threads, and how fast it copies."""

from __future__ import annotations

import functools
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import steppo_kernels as sk

# The default is read before anything changes it.
DEFAULT_THREADS = torch.get_num_threads()
THREADS = tuple(dict.fromkeys((DEFAULT_THREADS, 1)))
# What else runs shows here; the timings want an idle machine.
LOAD_BEFORE = os.getloadavg()[0]

# Well beyond any last-level cache: tensors of 256 MB, read and written.
COPY_BYTES = 512 * 2**20
_COPY_ROUNDS = 5
# What is read and written to empty the caches. Twice the last-level cache of the machine whose
# results are kept; the code and the objects of a call go with its inputs.
FLUSH_BYTES = 64 * 2**20


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _flushed() -> torch.Tensor:
    return torch.zeros(FLUSH_BYTES // 4)


def empty_caches() -> None:
    """Read and write 64 MB, on the threads that the next call may use."""
    _flushed().add_(1)


@functools.cache
def copy_bandwidth(
    num_bytes: int, num_threads: int, case: str, turn: int, *, cold: bool = False
) -> float:
    """Return the bytes a second of a `torch.Tensor.copy_` that reads and writes `num_bytes`.

    Measured by the process that is measured, once for each turn of each case, so that it is as
    slow as the machine is then. Working sets that stay in a cache move faster than the 512 MB that
    are the machine's line; those of a case's own size are shown next to it, cold for what is cold.
    """
    del case, turn
    source = torch.ones(num_bytes // 8)
    target = torch.zeros_like(source)
    rounds = _COPY_ROUNDS if num_bytes >= COPY_BYTES else 25
    times = []
    with threads(num_threads):
        for _ in range(rounds + 1):
            if cold:
                empty_caches()
            start = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - start)
    return 8 * source.numel() / statistics.median(times[1:])


def machine() -> dict[str, Any]:
    """Return where and when the numbers were taken."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": DEFAULT_THREADS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "steppo_kernels": sk.__version__,
        "load": round(LOAD_BEFORE, 1),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
