"""What one variant of a case gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "wrong", "failed", "not compiled", "no time"]

# Variants that are no backends of their own: the reference backend as it is, and compiled.
EAGER, COMPILED = "eager", "torch.compile"


@dataclass(frozen=True)
class Row:
    """What one variant of a case gave.

    Attributes:
        operation, variant: see `Case`.
        size: of the inputs.
        dtype: of the first of them; empty where none is floating.
        device: where they lie.
        implementation: a backend, `EAGER` (the reference) or `COMPILED`.
        status: ``"ok"``, or why there are no times. ``"wrong"`` and ``"failed"`` are faults.
        note: what happened.
        error: the largest error, relative to the largest entry of its output.
        ms, iqr_ms: median and interquartile range of a call, in milliseconds.
        turns: in how many it was measured.
        speedup: how many times as fast as eager it is, the median over the turns.
        gb_per_s: `Problem.moved` a second.
        device_ms: between CUDA events around a call; None on a CPU.
        peak_mib: memory that a call holds at most beside its inputs; None on a CPU.
    """

    operation: str
    variant: str
    size: str
    device: str
    implementation: str
    dtype: str = ""
    status: Status = "ok"
    note: str = ""
    error: float | None = None
    ms: float | None = None
    iqr_ms: float | None = None
    turns: int = 0
    speedup: float | None = None
    gb_per_s: float | None = None
    device_ms: float | None = None
    peak_mib: float | None = None

    @property
    def is_fault(self) -> bool:
        """Whether the variant is wrong or raised."""
        return self.status in ("wrong", "failed")
