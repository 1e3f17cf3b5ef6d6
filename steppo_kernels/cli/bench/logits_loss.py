"""Cases of `steppo_loss_from_logits`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.choice import Backend
from ...losses.logits_loss import steppo_loss_from_logits
from .batch import CONFIG, ON_LOGITS, logits_batch
from .case import BOTH, Case, Inputs, Problem, Size, first_as, nbytes


def _problem(size: Size, device: torch.device) -> Problem:
    logits, rows = logits_batch(size, device)
    layout = rows.batch.layout

    def call(inputs: Inputs, backend: Backend) -> tuple[Tensor, Tensor]:
        found = steppo_loss_from_logits(
            inputs["logits"],
            rows.token_ids,
            inputs["old_log_probs"],
            inputs["advantages"],
            layout,
            config=CONFIG,
            backend=backend,
        )
        return found.loss, found.metrics.values

    # The rows of logits of action tokens, and the gradient of all rows. Nothing else is as large.
    row = size.vocabulary * logits.itemsize
    return Problem(
        call,
        {
            "logits": logits,
            "old_log_probs": rows.old_log_probs,
            "advantages": rows.batch.advantages,
        },
        first_as("loss"),
        leaves=("logits",),
        moved=row * layout.num_tokens + nbytes(logits),
    )


CASES: tuple[Case, ...] = (Case("steppo_loss_from_logits", BOTH, ON_LOGITS, _problem),)
