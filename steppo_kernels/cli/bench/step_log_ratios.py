"""Cases of `step_log_ratios`: the sum over the tokens of each step, and the broadcast back."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.choice import Backend
from ...losses.step_log_ratios import step_log_ratios
from .batch import ON_TOKENS, Draw, token_batch
from .case import BOTH, Case, Inputs, Problem, Size, first_as, nbytes


def _problem(size: Size, device: torch.device) -> Problem:
    batch = token_batch(size, device)
    layout = batch.layout
    upstream = Draw(1, device).normal(layout.num_steps)

    def call(inputs: Inputs, backend: Backend) -> Tensor:
        return step_log_ratios(
            inputs["log_probs"], inputs["old_log_probs"], layout, backend=backend
        )

    number = batch.log_probs.itemsize
    read = 2 * number * layout.num_tokens + nbytes(layout.token_index, layout.step_offsets)
    # Backward reads a number a step, and writes one a token of its step's id.
    written = nbytes(upstream, upstream, layout.step_ids, batch.log_probs)
    return Problem(
        call,
        {"log_probs": batch.log_probs, "old_log_probs": batch.old_log_probs},
        first_as("step_log_ratios"),
        leaves=("log_probs",),
        upstream=upstream,
        moved=read + written,
    )


CASES: tuple[Case, ...] = (Case("step_log_ratios", BOTH, ON_TOKENS, _problem),)
