"""What a demo leaves behind: the training of each agent, and the files about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .train import Evaluation, IterationReport, TrajectoryTrace


@dataclass(frozen=True)
class Run:
    """One agent's training.

    Attributes:
        method: a name in `LEVELS`.
        seed: of everything random in it.
        before, after: the evaluations around the reinforcement learning.
        reports: one a round.
        trace: a trajectory of a round in the first half; only where steps are turns.
        seconds: wall-clock time of the reinforcement learning.
    """

    method: str
    seed: int
    before: Evaluation
    after: Evaluation
    reports: list[IterationReport]
    trace: TrajectoryTrace | None
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class DemoResult:
    """What `run_demo` did.

    Attributes:
        runs: one a method and seed; the first is StepPO with the first seed.
        files: what was written.
        seconds: wall-clock time of everything.
    """

    runs: list[Run]
    files: list[Path]
    seconds: float = field(compare=False)
