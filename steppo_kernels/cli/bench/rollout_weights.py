"""Cases of `rollout_weights`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.choice import Backend
from ...losses.rollout_weights import Level, rollout_weights
from .batch import ON_TOKENS, token_batch
from .case import FORWARD, Case, Inputs, Problem, Size, first_as, nbytes

# Far from the weights that are drawn.
_LOW, _HIGH = 0.01, 100.0


def _case(level: Level) -> Case:
    def draw_problem(size: Size, device: torch.device) -> Problem:
        batch = token_batch(size, device)
        layout = batch.layout

        def call(inputs: Inputs, backend: Backend) -> tuple[Tensor, Tensor]:
            found = rollout_weights(
                inputs["old_log_probs"],
                inputs["rollout_log_probs"],
                layout,
                level=level,
                low=_LOW,
                high=_HIGH,
                backend=backend,
            )
            return found.weights, found.metrics.values

        number, (steps, tokens) = batch.log_probs.itemsize, (layout.num_steps, layout.num_tokens)
        moved = 2 * number * tokens
        if level == "token":
            moved += nbytes(layout.step_ids, batch.log_probs)
        else:
            moved += nbytes(layout.token_index, layout.step_offsets) + number * steps
        return Problem(
            call,
            {"old_log_probs": batch.log_probs, "rollout_log_probs": batch.old_log_probs},
            first_as("weights"),
            moved=moved,
        )

    return Case("rollout_weights", f"{FORWARD}, {level}", ON_TOKENS, draw_problem)


CASES: tuple[Case, ...] = (_case("step"),)
