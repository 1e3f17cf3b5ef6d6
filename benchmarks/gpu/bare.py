"""What PyTorch itself takes of the host's time: a bare `autograd.Function` with a call's outputs.

Hosts differ in how long a launch takes them, and a wall time says little without one beside it that
no call can be faster than. A bare function allocates the outputs and the gradient, and launches one
kernel in each pass. That kernel touches few numbers, whatever the inputs are: the host is timed
only as long as the device is not what it waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# As many numbers as one block of threads touches.
_TOUCHED = 1024

Shape = Sequence[int]


class _Bare(torch.autograd.Function):
    """Outputs that hold nothing, the first of them with a gradient that holds nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        touched: Tensor,
        outputs: Sequence[tuple[Shape, torch.dtype]],
        in_place: bool,
    ) -> tuple[Tensor, ...]:
        touched.add_(1)
        found = tuple(x.new_empty(shape, dtype=dtype) for shape, dtype in outputs)
        if ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(*found[1:])
            ctx.touched = touched
            ctx.save_for_backward(x.detach() if in_place else torch.empty_like(x))
        return found

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        ctx.touched.add_(1)
        return ctx.saved_tensors[0], None, None, None


def bare(
    x: Tensor, *outputs: tuple[Shape, torch.dtype], in_place: bool = False
) -> Callable[[], tuple[Tensor, ...]]:
    """Return a call that computes nothing.

    Args:
        x: the input that may want a gradient. Without that nothing is recorded.
        outputs: shapes and dtypes of the results.
        in_place: the gradient takes the place of the input, as in a call that overwrites it.
    """
    touched = torch.zeros(_TOUCHED, device=x.device)

    def call() -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = _Bare.apply(x, touched, outputs, in_place)
        return found

    return call
