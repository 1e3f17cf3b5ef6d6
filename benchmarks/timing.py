"""Timing of variants side by side.

Each variant of a case is timed in several short turns, one variant after the other in every turn,
so that a change of the machine's speed meets all of them; a ratio is taken within a turn and
reported as the median over the turns. Nothing is timed before its results agree with a reference
of higher precision. Functions on log-probs are timed cold and warm (`modes.py`); those that read
logits or a head move more than any cache holds, and are timed warm alone.

glibc hands freed blocks back to the system until the process has freed a large one: before that,
every variant would pay for fresh pages in each call. A training process has freed many, so one is
freed here before anything is timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .machine import COPY_BYTES, THREADS, copy_bandwidth, empty_caches, threads
from .modes import COLD, WARM
from .variants import Variant

TURNS, GROWTH_TURNS = 5, 3

# The time and the rounds of one variant in one turn. A slow call is its own warm-up, and one round
# a turn has to do.
_SECONDS, MAX_ROUNDS = 0.12, 200
_SLOW = 0.05
# Emptying the caches takes longer than most calls.
_COLD_ROUNDS = 15


def _free_a_large_block() -> None:
    """Free the largest block for which glibc still moves its threshold (32 MB)."""
    torch.empty(2**25 - 4096, dtype=torch.uint8)


_free_a_large_block()


@dataclass(frozen=True)
class Run:
    """One timing: a variant of a case in one turn."""

    case: str
    variant: Variant
    threads: int
    turn: int
    mode: str = WARM

    def __str__(self) -> str:
        parts = self.case, self.variant, self.mode, f"{self.threads}thr", self.turn
        return "-".join(map(str, parts)).replace(" ", "_")


def runs(
    case: str,
    variants: Iterable[Variant],
    threads: Iterable[int] = THREADS,
    turns: int = TURNS,
    modes: Iterable[str] = (WARM,),
) -> list[Run]:
    """Return the timings of a case, the variants side by side in each turn of a mode.

    A variant with a number of turns of its own takes part in the first ones.
    """
    turns_of = {variant: variant.turns or turns for variant in variants}
    return [
        Run(case, variant, count, turn, mode)
        for mode in modes
        for count in threads
        for turn in range(max(turns_of.values(), default=0))
        for variant, last in turns_of.items()
        if turn < last
    ]


def measure(
    benchmark: Any,
    run: Run,
    call: Callable[[], object],
    *,
    tokens: int,
    bytes_to_touch: int = 0,
    setup: Callable[[], object] | None = None,
    info: dict[str, Any] | None = None,
    max_rounds: int = MAX_ROUNDS,
) -> None:
    """Time `call` in rounds (`setup` untimed before each) and note what the report reads.

    Args:
        benchmark: the fixture of pytest-benchmark.
        run: what is timed.
        call: the variant.
        tokens: what ns/token divides by.
        bytes_to_touch: what GB/s counts; 0 leaves it out.
        setup: e.g. a reset of gradients.
        info: anything else to keep.
        max_rounds: of a warm turn; what takes microseconds wants many.

    A variant with a number of rounds takes long and has been called before: it is not warmed up.
    """
    rounds = run.variant.rounds
    cold = run.mode == COLD

    def prepare() -> None:
        if setup is not None:
            setup()
        if cold:
            empty_caches()

    with threads(run.threads):
        warmup_rounds = 0
        if rounds is None:
            for _ in range(2):
                prepare()
                start = time.perf_counter()
                call()
                once = time.perf_counter() - start
                if once > _SLOW:
                    break
            rounds = min(_COLD_ROUNDS if cold else max_rounds, math.ceil(_SECONDS / once))
            warmup_rounds = 3 if once < _SLOW and not cold else 0
        benchmark.group = f"{run.case}, {run.mode}, {run.threads} threads"
        benchmark.pedantic(call, setup=prepare, rounds=rounds, warmup_rounds=warmup_rounds)
        seconds = benchmark.stats.stats.median
        noted = {
            "case": run.case,
            "variant": run.variant.name,
            "mode": run.mode,
            "threads": run.threads,
            "turn": run.turn,
            "tokens": tokens,
            "ns_per_token": seconds * 1e9 / tokens,
            **(info or {}),
        }
        if bytes_to_touch:
            copy = copy_bandwidth(COPY_BYTES, run.threads, run.case, run.turn)
            same_size = copy_bandwidth(bytes_to_touch, run.threads, run.case, run.turn, cold=cold)
            noted |= {
                "bytes": bytes_to_touch,
                "gbps": bytes_to_touch / seconds / 1e9,
                "copy_gbps": copy / 1e9,
                "copy_fraction": bytes_to_touch / seconds / copy,
                "copy_gbps_same_size": same_size / 1e9,
            }
        benchmark.extra_info.update(noted)
