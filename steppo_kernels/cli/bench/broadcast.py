"""Cases of `broadcast_to_tokens`: backward adds up the tokens of each step."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.choice import Backend
from ...backends.reference import broadcast as reference
from ...layout.broadcast import broadcast_to_tokens
from .batch import ON_TOKENS, Draw, token_batch
from .case import BOTH, FORWARD, Case, Inputs, Problem, Size, first_as, nbytes


def _case(variant: str) -> Case:
    def draw_problem(size: Size, device: torch.device) -> Problem:
        batch = token_batch(size, device)
        layout, per_step = batch.layout, batch.advantages
        step_ids = layout.step_ids.view(-1)
        upstream = Draw(1, device).normal(*layout.shape)

        def call(inputs: Inputs, backend: Backend) -> Tensor:
            return broadcast_to_tokens(inputs["per_step"], layout, backend=backend)

        def plain(inputs: Inputs, _: Backend) -> Tensor:
            return reference.broadcast_to_tokens(inputs["per_step"], step_ids).view(layout.shape)

        moved = nbytes(per_step, step_ids, upstream)
        if variant == BOTH:
            # Backward reads the gradients of action tokens, where these are, and writes a number
            # a step.
            entry = upstream.itemsize + layout.token_index.itemsize
            moved += layout.num_tokens * entry + nbytes(layout.step_offsets, per_step)
        return Problem(
            call,
            {"per_step": per_step},
            first_as("per_token"),
            leaves=("per_step",) if variant == BOTH else (),
            upstream=upstream,
            moved=moved,
            plain=plain,
        )

    return Case("broadcast_to_tokens", variant, ON_TOKENS, draw_problem)


CASES: tuple[Case, ...] = (_case(FORWARD), _case(BOTH))
