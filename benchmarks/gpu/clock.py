"""How a call is measured: on a GPU by events and the profiler, on a CPU by the host's clock alone.

Before each call whose device time is taken, the GPU reads and writes more than its L2 cache holds,
for as long as the host needs to submit the call. Neither the host nor a warm cache is measured
then. A call that waits for the device cannot be submitted ahead: its waits are in the number.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..memory import peak_bytes

Step = Callable[[], object]

# The rounds of one variant in one turn.
_FEWEST, _MOST = 2, 30
# Calls below this are short: the host's time is taken over many of them.
_SHORT = 1e-3
_BATCH_SECONDS, _BATCHES = 0.01, 3
# What is read and written to empty the cache, as a multiple of it; and for how long at most.
_FLUSH, _LONGEST_FLUSH = 3, 0.02
# Calls that the profiler sees. Beyond this time it would see too many launches.
_PROFILED, _LONGEST_PROFILED = 3, 0.3
_WARM_UP, _RATE_ROUNDS = 3, 10


class Turn(NamedTuple):
    """Seconds of a call, as medians of one turn: on the device (None on a CPU), by the host."""

    device: float | None
    wall: float


class Launches(NamedTuple):
    """What a call submits: kernels and their seconds, copies and fills."""

    kernels: int
    seconds: float
    copies: int


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Collect garbage now, and none for a while."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class HostClock:
    """A CPU: the host's clock is the only one, and there are no launches.

    Attributes:
        seconds: of one variant in one turn. Times on a CPU are not what is asked for here.
    """

    seconds = 0.01

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def settle(self) -> None:
        """Wait for all that was submitted."""

    def turn(self, call: Step, reset: Step | None) -> Turn:
        """Return the times of a call over one turn; `reset` comes before each, untimed."""
        once = self._alone(call, reset)
        rounds = max(_FEWEST, min(_MOST, math.ceil(self.seconds / once)))
        with _no_garbage():
            return self._timed(call, reset, once, rounds)

    def launches(self, call: Step, reset: Step | None) -> Launches | None:
        """Return what a call submits; None where that cannot be told."""
        return None

    def peak(self, call: Step, reset: Step | None) -> int:
        """Return the most bytes that a call holds beside what was held before."""
        if reset is not None:
            reset()
        return peak_bytes(call)

    def rate(self, call: Step, amount: float) -> float:
        """Return how much of something a call does in a second, at its best."""
        for _ in range(_WARM_UP):
            call()
        return amount / min(self._alone(call, None) for _ in range(_RATE_ROUNDS))

    def _alone(self, call: Step, reset: Step | None) -> float:
        """Return the host's seconds of one call, to its end."""
        if reset is not None:
            reset()
        self.settle()
        begin = time.perf_counter()
        call()
        self.settle()
        return time.perf_counter() - begin

    def _timed(self, call: Step, reset: Step | None, once: float, rounds: int) -> Turn:
        return Turn(None, statistics.median(self._alone(call, reset) for _ in range(rounds)))


class DeviceClock(HostClock):
    """An NVIDIA GPU."""

    seconds = 0.06

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flushed = torch.zeros(_FLUSH * cache // 4, device=device)
        self._flush()
        self._one_flush = statistics.median(self._between(self._flush) for _ in range(_RATE_ROUNDS))

    def settle(self) -> None:
        """Wait for all that was submitted."""
        torch.cuda.synchronize(self.device)

    def launches(self, call: Step, reset: Step | None) -> Launches | None:
        """Return what a call submits, as the profiler sees it.

        None if a call takes too long, or where the profiler sees nothing: it may lack the right to.
        """
        if self._alone(call, reset) > _LONGEST_PROFILED:
            return None
        found = [self._profiled(call, reset) for _ in range(_PROFILED)]
        if not any(one.kernels for one in found):
            return None
        return Launches(
            round(statistics.median(one.kernels for one in found)),
            statistics.median(one.seconds for one in found),
            round(statistics.median(one.copies for one in found)),
        )

    def peak(self, call: Step, reset: Step | None) -> int:
        """Return the most bytes that a call holds beside what was held before."""
        if reset is not None:
            reset()
        gc.collect()
        self.settle()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.settle()
        return int(torch.cuda.max_memory_allocated(self.device) - before)

    def rate(self, call: Step, amount: float) -> float:
        """Return how much of something a call does in a second, at its best."""
        for _ in range(_WARM_UP):
            call()
        return amount / min(self._between(call) for _ in range(_RATE_ROUNDS))

    def _timed(self, call: Step, reset: Step | None, once: float, rounds: int) -> Turn:
        flushes = 1 + math.ceil(min(once, _LONGEST_FLUSH) / self._one_flush)

        def ahead() -> None:
            if reset is not None:
                reset()
            for _ in range(flushes):
                self._flush()

        device = statistics.median(self._between(call, ahead) for _ in range(rounds))
        if once > _SHORT or reset is not None:
            return Turn(device, statistics.median(self._alone(call, reset) for _ in range(rounds)))
        return Turn(device, self._in_batches(call, math.ceil(_BATCH_SECONDS / once)))

    def _in_batches(self, call: Step, count: int) -> float:
        """Return the host's seconds of a call among many, which are waited for together."""

        def batch() -> None:
            for _ in range(count):
                call()

        return statistics.median(self._alone(batch, None) for _ in range(_BATCHES)) / count

    def _flush(self) -> None:
        self._flushed.add_(1)

    def _between(self, call: Step, ahead: Step | None = None) -> float:
        """Return the seconds between two events around a call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.settle()
        if ahead is not None:
            ahead()
        start.record()
        call()
        end.record()
        self.settle()
        return float(start.elapsed_time(end)) / 1e3

    def _profiled(self, call: Step, reset: Step | None) -> Launches:
        if reset is not None:
            reset()
        self._flush()
        self.settle()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            self.settle()
        return counted(profiler.events())


def counted(events: object) -> Launches:
    """Return what stands in the events of a profiler."""
    kernels = copies = 0
    microseconds = 0.0
    for event in events:  # type: ignore[attr-defined]
        if event.device_type != DeviceType.CUDA:
            continue
        if event.name.startswith(("Memcpy", "Memset")):
            copies += 1
        else:
            kernels += 1
            microseconds += event.time_range.elapsed_us()
    return Launches(kernels, microseconds / 1e6, copies)


def clock_of(device: torch.device) -> HostClock:
    """Return the clock of a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock(device)
