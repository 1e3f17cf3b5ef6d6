"""Cases of `steppo_loss`, with a layout and with a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.choice import Backend
from ...losses.policy_loss import steppo_loss
from .batch import CONFIG, ON_TOKENS, token_batch
from .case import BOTH, Case, Inputs, Problem, Size, first_as, nbytes


def _problem(size: Size, device: torch.device) -> Problem:
    batch = token_batch(size, device)
    layout = batch.layout

    def call(inputs: Inputs, backend: Backend) -> tuple[Tensor, Tensor]:
        found = steppo_loss(
            inputs["log_probs"],
            inputs["old_log_probs"],
            inputs["advantages"],
            layout,
            config=CONFIG,
            backend=backend,
        )
        return found.loss, found.metrics.values

    # Both log-probs of the action tokens; of each step its advantage and where it begins and ends;
    # the gradient of all tokens.
    number, (steps, tokens) = batch.log_probs.itemsize, (layout.num_steps, layout.num_tokens)
    where = nbytes(layout.step_offsets) + 2 * layout.token_index.itemsize * steps
    return Problem(
        call,
        {
            "log_probs": batch.log_probs,
            "old_log_probs": batch.old_log_probs,
            "advantages": batch.advantages,
        },
        first_as("loss"),
        leaves=("log_probs",),
        moved=number * (2 * tokens + steps) + where + nbytes(batch.log_probs),
    )


def _masked(size: Size, device: torch.device) -> Problem:
    batch = token_batch(size, device)
    mask = batch.mask

    def call(inputs: Inputs, backend: Backend) -> tuple[Tensor, Tensor]:
        found = steppo_loss(
            inputs["log_probs"],
            inputs["old_log_probs"],
            inputs["advantages"],
            mask,
            config=CONFIG,
            backend=backend,
        )
        return found.loss, found.metrics.values

    # The mask; both log-probs and the advantages of the action tokens; the gradient of all.
    number, tokens = batch.log_probs.itemsize, batch.layout.num_tokens
    return Problem(
        call,
        {
            "log_probs": batch.log_probs,
            "old_log_probs": batch.old_log_probs,
            "advantages": batch.token_advantages,
        },
        first_as("loss"),
        leaves=("log_probs",),
        moved=nbytes(mask, batch.log_probs) + 3 * number * tokens,
        why_not_compiled="of a mask the reference makes a layout, whose sizes depend on its steps",
    )


CASES: tuple[Case, ...] = (
    Case("steppo_loss", f"layout, {BOTH}", ON_TOKENS, _problem),
    Case("steppo_loss", f"mask, {BOTH}", ON_TOKENS, _masked),
)
