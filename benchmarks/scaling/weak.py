"""Weak scaling on a CPU: the same work on each of one and of two processes, in turns.

``python -m benchmarks.scaling.weak`` writes ``results/scaling.json`` and a plot beside it. Each
process has one thread. While one process works alone the other waits, so that both numbers of a
turn are of the same minute of the machine. What two of them share (caches, memory, the clock of the
cores) is part of the efficiency, as it is for any code.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed

from steppo_kernels import StepLayout, StepPOConfig, linear_steppo_loss
from steppo_kernels.distributed import (
    ContextShard,
    batch_reduction,
    context_linear_steppo_loss,
    merge_metrics,
)

from ..machine import machine
from .plot import draw

RESULTS = Path(__file__).parents[1] / "results"
SIZES = (1, 2)
# Nothing is clipped: every row of the head has a gradient.
_CONFIG = StepPOConfig(clip_low=0.9, clip_high=9.0)


class Shape(NamedTuple):
    """The work of a rank: tokens in steps of a length, hidden size, and ids of the vocabulary."""

    tokens: int = 256
    step: int = 32
    size: int = 896
    vocabulary: int = 32_768

    def __str__(self) -> str:
        return (
            f"{self.tokens} action tokens in steps of {self.step}, d {self.size}, "
            f"V {self.vocabulary}, fp32"
        )


class Batch(NamedTuple):
    """What a loss takes."""

    hidden: torch.Tensor
    weight: torch.Tensor
    token_ids: torch.Tensor
    old_log_probs: torch.Tensor
    advantages: torch.Tensor
    layout: StepLayout

    @staticmethod
    def draw(tokens: int, vocabulary: int, shape: Shape, seed: int) -> Batch:
        """Return a row of `tokens` action tokens in steps, and a head with so many ids."""
        generator = torch.Generator().manual_seed(seed)
        numbers = functools.partial(torch.randn, generator=generator)
        steps = (torch.arange(tokens) // shape.step).unsqueeze(0)
        return Batch(
            numbers(1, tokens, shape.size).requires_grad_(),
            (shape.size**-0.5 * numbers(vocabulary, shape.size)).requires_grad_(),
            torch.randint(vocabulary, (1, tokens), generator=generator),
            numbers(1, tokens) - 10.0,
            numbers(-(-tokens // shape.step)),
            StepLayout.from_step_ids(steps),
        )


def over_data(shape: Shape, rank: int, group: Any) -> Callable[[], torch.Tensor]:
    """Each rank has tokens of its own, and the whole head."""
    batch = Batch.draw(shape.tokens, shape.vocabulary, shape, rank)

    def run() -> torch.Tensor:
        whole = batch_reduction(batch.layout, _CONFIG.reduction, group=group)
        out = linear_steppo_loss(*batch, config=_CONFIG, normalizer=whole.normalizer)
        out.loss.backward()
        return merge_metrics(out.metrics, group=group)["policy_loss"]

    return _fresh(batch, run)


def over_vocabulary(shape: Shape, rank: int, group: Any) -> Callable[[], torch.Tensor]:
    """Each rank has all tokens, and ids of its own."""
    size = distributed.get_world_size(group)
    batch = Batch.draw(shape.tokens, size * shape.vocabulary, shape, 0)
    rows = slice(rank * shape.vocabulary, (rank + 1) * shape.vocabulary)
    batch = batch._replace(weight=batch.weight.detach()[rows].clone().requires_grad_())

    def run() -> torch.Tensor:
        out = linear_steppo_loss(*batch, config=_CONFIG, tp_group=group)
        out.loss.backward()
        return out.loss

    return _fresh(batch, run)


def over_tokens(shape: Shape, rank: int, group: Any) -> Callable[[], torch.Tensor]:
    """Each rank has tokens of the same steps, and the whole head."""
    size = distributed.get_world_size(group)
    batch = Batch.draw(size * shape.tokens, shape.vocabulary, shape, 0)
    shard = ContextShard.zigzag(size * shape.tokens, group=group)
    own = batch._replace(
        hidden=shard.local(batch.hidden.detach()).clone().requires_grad_(),
        token_ids=shard.local(batch.token_ids),
    )

    def run() -> torch.Tensor:
        out = context_linear_steppo_loss(*own, shard, config=_CONFIG)
        out.loss.backward()
        return out.loss

    return _fresh(own, run)


WAYS = {"data": over_data, "vocabulary": over_vocabulary, "tokens": over_tokens}


def _fresh(batch: Batch, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return a run that begins without gradients."""

    def step() -> torch.Tensor:
        batch.hidden.grad = batch.weight.grad = None
        return run()

    return step


def _on_rank(rank: int, rendezvous: str, turns: int, shape: Shape, answer: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=max(SIZES),
        timeout=timedelta(minutes=5),
    )
    groups = {size: distributed.new_group(list(range(size))) for size in SIZES}
    found: dict[str, dict[int, list[float]]] = {way: {s: [] for s in SIZES} for way in WAYS}
    for way, make in WAYS.items():
        steps = {size: make(shape, rank, groups[size]) for size in SIZES if rank < size}
        for turn in range(turns + 1):
            for size in SIZES:
                distributed.barrier()
                if rank >= size:
                    continue
                begin = time.perf_counter()
                steps[size]()
                # The first turn warms up.
                if turn:
                    found[way][size].append(time.perf_counter() - begin)
        distributed.barrier()
    if rank == 0:
        Path(answer).write_text(json.dumps(found))
    distributed.barrier()
    # Not through Python's own exit, in which a thread of gloo now and again ends the process.
    os._exit(0)


def measure(turns: int, shape: Shape) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each turn, by what is split and the number of processes."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        torch.multiprocessing.spawn(
            _on_rank,
            (str(Path(folder) / "rendezvous"), turns, shape, str(answer)),
            nprocs=max(SIZES),
        )
        found: dict[str, dict[str, list[float]]] = json.loads(answer.read_text())
    return found


def summary(seconds: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Return medians over the turns, and the efficiency: that of one process by that of two."""
    found = {}
    for way, by_size in seconds.items():
        medians = {size: statistics.median(times) for size, times in by_size.items()}
        found[way] = {"seconds": medians, "efficiency": medians["1"] / medians["2"]}
    return found


def main() -> None:
    """Measure, and write the numbers and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args()
    shape = Shape()
    seconds = measure(options.turns, shape)
    document = {
        "machine": machine(),
        "work of a rank": str(shape),
        "turns": options.turns,
        "ways": summary(seconds),
        "seconds": seconds,
    }
    path = options.out / "scaling.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    draw(document, options.out / "scaling.png")
    for way, numbers in document["ways"].items():
        times = ", ".join(f"{s} on {n}" for n, s in numbers["seconds"].items())
        print(f"{way}: {times}; efficiency {numbers['efficiency']:.2f}")


if __name__ == "__main__":
    main()
