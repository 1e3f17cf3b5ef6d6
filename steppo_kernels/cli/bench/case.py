"""What one benchmark consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...backends.choice import Backend

Inputs = Mapping[str, Tensor]
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """How large the inputs of a call are.

    Attributes:
        rows, length: the token shape.
        vocabulary: V, where there are logits.
        hidden: d, where there are hidden states.
    """

    rows: int
    length: int
    vocabulary: int = 0
    hidden: int = 0

    def __str__(self) -> str:
        parts = [f"{self.rows}x{self.length}"]
        parts += [f"V {self.vocabulary}"] if self.vocabulary else []
        parts += [f"d {self.hidden}"] if self.hidden else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Problem:
    """One call on one batch.

    Attributes:
        call: the call that is timed. `torch.compile` is given it with the reference backend.
        inputs: floating tensors. The exact answer is that of the same numbers in a wider dtype.
        outputs: names the outputs that must be right.
        leaves: the inputs whose gradients the call is differentiated by, none in a forward call.
            Then the result is a tensor, or a tuple of which the first is differentiated.
        upstream: the gradient of that tensor; None is 1, for a loss.
        tolerance: how far an output may be off, relative to its largest entry. None is that of its
            dtype.
        moved: bytes of the inputs, each read once, and of the outputs and gradients, each written
            once. None where arithmetic decides, or the work depends on what is found.
        plain: what `torch.compile` is given instead.
        why_not_compiled: why the call cannot be compiled; empty if it is tried.
    """

    call: Callable[[Inputs, Backend], Any]
    inputs: Inputs
    outputs: Callable[[Any], Outputs]
    leaves: tuple[str, ...] = ()
    upstream: Tensor | None = None
    tolerance: float | None = None
    moved: int | None = None
    plain: Callable[[Inputs, Backend], Any] | None = None
    why_not_compiled: str = ""


@dataclass(frozen=True)
class Case:
    """A way to call an operation.

    Attributes:
        operation: name of the public function.
        variant: which way, such as forward alone.
        sizes: for each type of device, the sizes that are timed, in ascending order.
        draw: makes the problem of a size on a device.
    """

    operation: str
    variant: str
    sizes: Mapping[str, tuple[Size, ...]]
    draw: Callable[[Size, torch.device], Problem]


FORWARD, BOTH = "forward", "forward + backward"


def first_as(name: str) -> Callable[[Any], Outputs]:
    """Return what names the one output of a call, the first of a tuple."""
    return lambda found: {name: differentiated(found)}


def differentiated(found: Any) -> Tensor:
    """Return the tensor of a result that gradients are taken of."""
    tensor: Tensor = found[0] if isinstance(found, tuple) else found
    return tensor


def nbytes(*tensors: Tensor) -> int:
    """Return how many bytes tensors take."""
    return sum(tensor.nbytes for tensor in tensors)
