"""What one check consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ...backends.choice import Backend
from .draw import Draw

Inputs = Mapping[str, Tensor]
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """One call on one random batch.

    Attributes:
        run: makes the call with these inputs on a backend and names what comes out of it. An
            output called ``grad_...`` must be exactly 0 where the exact answer is.
        inputs: floating tensors, rounded to the dtype under test.
        unread: for some of the inputs, bool of their shape: slots that must not matter.
    """

    run: Callable[[Inputs, Backend], Outputs]
    inputs: Inputs = field(default_factory=dict)
    unread: Inputs = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A way to call an operation.

    Attributes:
        operation: name of the public function.
        variant: which of its options are on.
        draw: draws a problem.
        exact: nothing floating is involved, every output must be equal.
        more_draws: how many more draws the yardstick in half precision is measured on. It is needed
            where plain PyTorch rounds what a backend does not, or rounds it elsewhere.
    """

    operation: str
    variant: str
    draw: Callable[[Draw], Problem]
    exact: bool = False
    more_draws: int = 0
