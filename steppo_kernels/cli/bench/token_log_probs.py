"""Cases of `token_log_probs`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.choice import Backend
from ...log_probs.token_log_probs import token_log_probs
from .batch import ON_LOGITS, Draw, logits_batch
from .case import BOTH, FORWARD, Case, Inputs, Problem, Size, first_as, nbytes


def _log_probs_case(variant: str) -> Case:
    def draw_problem(size: Size, device: torch.device) -> Problem:
        logits, rows = logits_batch(size, device)
        upstream = Draw(2, device).normal(*rows.token_ids.shape)

        def call(inputs: Inputs, backend: Backend) -> Tensor:
            found = token_log_probs(inputs["logits"], rows.token_ids, backend=backend)
            assert isinstance(found, Tensor)
            return found

        moved = nbytes(logits, rows.token_ids, rows.old_log_probs)
        return Problem(
            call,
            {"logits": logits},
            first_as("log_probs"),
            leaves=("logits",) if variant == BOTH else (),
            upstream=upstream,
            moved=moved + (nbytes(upstream, logits) if variant == BOTH else 0),
        )

    return Case("token_log_probs", variant, ON_LOGITS, draw_problem)


CASES: tuple[Case, ...] = (_log_probs_case(FORWARD), _log_probs_case(BOTH))
