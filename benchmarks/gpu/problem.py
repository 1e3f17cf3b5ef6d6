"""What a case is made of: calls that do the same work, and the check that they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from steppo_kernels.backends import choice

from ..variants import Variant
from .variants import OF_BACKENDS

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]

FORWARD, BOTH = "forward", "forward + backward"


class Name(NamedTuple):
    """A function, a way to call it, and the shape of its inputs."""

    function: str
    how: str
    shape: str

    def __str__(self) -> str:
        return ", ".join(self)


@dataclass(frozen=True)
class Problem:
    """A case on a device.

    Attributes:
        calls: the variants, in the order in which they are prepared.
        check: returns the largest error of a variant's outputs, and raises if it is too large.
        reset: makes the inputs what they were, for calls that overwrite them.
        moved: bytes that the task has to move at least.
        operations: floating-point operations of its matrix products.
        floors: variants that compute no result to check.
        left_out: why a variant is not among the calls.
        smaller: how the inputs differ from the name of the case, where memory asks for it.
    """

    calls: dict[Variant, Call]
    check: Callable[[Variant, Outputs], float]
    reset: Callable[[], object] | None = None
    moved: int | None = None
    operations: float | None = None
    floors: tuple[Variant, ...] = ()
    left_out: dict[Variant, str] = field(default_factory=dict)
    smaller: str = ""


class Case(NamedTuple):
    """A case by name, and how it is made on a device."""

    name: Name
    make: Callable[[torch.device], Problem]


def backends(device: torch.device) -> tuple[dict[Variant, str], dict[Variant, str]]:
    """Return the backends that run on a device, and why others that take it do not run."""
    taken = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
    reasons = {name: choice.unavailable(name, device) for name in taken}
    runs = {OF_BACKENDS[name]: name for name, why in reasons.items() if why is None}
    return runs, {OF_BACKENDS[name]: why for name, why in reasons.items() if why is not None}


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a GPU, with what torch keeps for itself; None on a CPU."""
    if device.type == "cpu":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + kept)


def that_fit(count: int, each: int, fixed: int, free: int | None) -> int:
    """Return how many of `count` fit into free memory, halved until they do; at least 1.

    Args:
        count: how many are wanted.
        each: bytes of one.
        fixed: bytes beside them.
        free: bytes, None if all fit.
    """
    while free is not None and count > 1 and fixed + count * each > free:
        count //= 2
    return count
