"""Cases of `linear_token_log_probs` and of `linear_steppo_loss`.

Matrix products decide what these take, and no number of bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.choice import Backend
from ...log_probs.linear_token_log_probs import linear_token_log_probs
from ...losses.linear_steppo_loss import linear_steppo_loss
from .batch import CONFIG, ON_HIDDEN, hidden_batch
from .case import BOTH, FORWARD, Case, Inputs, Problem, Size, first_as

# Where torch has no product of bf16 that gives fp32, a GPU rounds logits to bf16.
_TOLERANCE = 0.05


def _log_probs(size: Size, device: torch.device) -> Problem:
    hidden, weight, rows = hidden_batch(size, device)

    def call(inputs: Inputs, backend: Backend) -> Tensor:
        found = linear_token_log_probs(
            inputs["hidden"], inputs["weight"], rows.token_ids, backend=backend
        )
        assert isinstance(found, Tensor)
        return found

    return Problem(
        call, {"hidden": hidden, "weight": weight}, first_as("log_probs"), tolerance=_TOLERANCE
    )


def _loss(size: Size, device: torch.device) -> Problem:
    hidden, weight, rows = hidden_batch(size, device)
    layout = rows.batch.layout

    def call(inputs: Inputs, backend: Backend) -> tuple[Tensor, Tensor]:
        found = linear_steppo_loss(
            inputs["hidden"],
            inputs["weight"],
            rows.token_ids,
            inputs["old_log_probs"],
            inputs["advantages"],
            layout,
            config=CONFIG,
            backend=backend,
        )
        return found.loss, found.metrics.values

    return Problem(
        call,
        {
            "hidden": hidden,
            "weight": weight,
            "old_log_probs": rows.old_log_probs,
            "advantages": rows.batch.advantages,
        },
        first_as("loss"),
        leaves=("hidden", "weight"),
        tolerance=_TOLERANCE,
    )


CASES: tuple[Case, ...] = (
    Case("linear_token_log_probs", FORWARD, ON_HIDDEN, _log_probs),
    Case("linear_steppo_loss", BOTH, ON_HIDDEN, _loss),
)
