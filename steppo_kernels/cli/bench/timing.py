"""Times of variants side by side, and what only a GPU can tell.

`torch.utils.benchmark` measures: it repeats a call in blocks that are long beside its clock, and
waits for the device around each. The variants of a case take turns, so that a change of the
machine's speed meets all of them, and a ratio is taken within a turn.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Measurement, Timer

Step = Callable[[], object]

# What a variant is measured for in a turn, at least; a slow call is measured once.
_SLICE = 0.02
# Turns of a case, while there is time.
_LEAST_TURNS, _MOST_TURNS = 3, 25
# What is written before a call that is timed between events: more than the caches of a GPU hold.
_FILL_BYTES = 256 * 2**20
# How often such a call is timed, if that does not take longer than so many seconds.
_EVENT_ROUNDS, _EVENT_SECONDS = 9, 0.1
# No call takes longer to be submitted.
_SUBMISSION = 5e-3


@dataclass(frozen=True)
class Times:
    """What the turns of a variant gave.

    Attributes:
        median: seconds of a call, over all blocks of calls.
        iqr: the range of their middle half; None of fewer than three blocks.
        turns: how many.
        speedup: the median over the turns of how many times faster it is than the first variant.
    """

    median: float
    iqr: float | None
    turns: int
    speedup: float


def in_turns(
    steps: Mapping[str, Step], end: float, late: float
) -> tuple[dict[str, Times], dict[str, Exception]]:
    """Time variants until `end`, and a few turns in any case.

    Args:
        steps: the variants; the first is what the others are compared with.
        end: by `time.monotonic`, when the least number of turns is enough.
        late: when the first turn is.

    Returns:
        The times, and what a variant raised that has none.
    """
    threads = torch.get_num_threads()
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=threads, label=name)
        for name, step in steps.items()
    }
    measured: dict[str, list[Measurement]] = {name: [] for name in steps}
    raised: dict[str, Exception] = {}
    for turn in range(_MOST_TURNS):
        if turn and time.monotonic() > (end if turn >= _LEAST_TURNS else late):
            break
        for name, timer in timers.items():
            if name in raised:
                continue
            try:
                measured[name].append(timer.blocked_autorange(min_run_time=_SLICE))
            except Exception as error:
                raised[name] = error
    first = measured[next(iter(steps))]
    return {
        name: _times(turns, first) for name, turns in measured.items() if name not in raised
    }, raised


def _times(turns: list[Measurement], first: list[Measurement]) -> Times:
    (merged,) = Measurement.merge(turns)
    ratios = [base.median / own.median for base, own in zip(first, turns, strict=False)]
    return Times(
        median=merged.median,
        iqr=merged.iqr if len(merged.times) > 2 else None,
        turns=len(turns),
        speedup=statistics.median(ratios) if ratios else math.nan,
    )


def device_seconds(step: Step, wall: float, device: torch.device) -> float:
    """Return the seconds between two CUDA events around a call: what the GPU takes.

    Before each call the GPU writes memory for as long as the host needs to submit the call. Neither
    the host is measured then, nor a cache that holds the inputs. A call that waits for the device
    cannot be submitted ahead: its waits are in the number.

    Args:
        step: the call.
        wall: seconds of a call, device and host.
        device: the GPU, which is the current one.
    """
    fill = torch.empty(_FILL_BYTES, dtype=torch.uint8, device=device)
    one_fill = statistics.median(_between_events(fill.zero_) for _ in range(_EVENT_ROUNDS))
    fills = 1 + math.ceil(min(wall, _SUBMISSION) / one_fill)

    def ahead() -> None:
        for _ in range(fills):
            fill.zero_()

    rounds = max(1, min(_EVENT_ROUNDS, int(_EVENT_SECONDS / wall)))
    return statistics.median(_between_events(step, ahead) for _ in range(rounds))


def _between_events(step: Step, ahead: Step = lambda: None) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    ahead()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def peak_bytes(step: Step) -> int:
    """Return the most bytes of the current GPU that a call holds beside what was held before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
