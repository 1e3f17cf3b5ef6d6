"""Cases of `step_value_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.choice import Backend
from ...losses.value_loss import step_value_loss
from .batch import ON_TOKENS, Draw, token_batch
from .case import BOTH, Case, Inputs, Problem, Size, first_as, nbytes


def _problem(size: Size, device: torch.device) -> Problem:
    batch, draw = token_batch(size, device), Draw(1, device)
    layout = batch.layout
    # Not one value has moved by about as much as the clip allows.
    far = draw.uniform(*layout.shape) < 0.25
    old = batch.values + torch.where(far, 1.0, 0.1) * (0.9 + 0.1 * draw.uniform(*layout.shape))

    def call(inputs: Inputs, backend: Backend) -> tuple[Tensor, Tensor]:
        found = step_value_loss(
            inputs["values"],
            inputs["returns"],
            layout,
            old_values=inputs["old_values"],
            backend=backend,
        )
        return found.loss, found.metrics.values

    # Of each step its return, where its state is and both values there; the gradient of all tokens.
    number = batch.values.itemsize
    return Problem(
        call,
        {"values": batch.values, "old_values": old, "returns": draw.normal(layout.num_steps)},
        first_as("loss"),
        leaves=("values",),
        moved=3 * number * layout.num_steps + nbytes(layout.state_index, batch.values),
    )


CASES: tuple[Case, ...] = (Case("step_value_loss", BOTH, ON_TOKENS, _problem),)
