"""Cases of `broadcast_to_tokens`."""

from __future__ import annotations

import torch

from ...backends.choice import Backend
from ...layout.broadcast import broadcast_to_tokens
from .case import Case, Inputs, Outputs, Problem
from .draw import Draw
from .layouts import random_layout


def _problem(draw: Draw) -> Problem:
    layout = random_layout(draw)
    upstream = draw.normal(*layout.shape)

    def run(inputs: Inputs, backend: Backend) -> Outputs:
        per_step = inputs["per_step"].detach().clone().requires_grad_()
        per_token = broadcast_to_tokens(per_step, layout, backend=backend)
        (grad,) = torch.autograd.grad(per_token, per_step, inputs["upstream"].to(per_token.dtype))
        return {"per_token": per_token.detach(), "grad_per_step": grad}

    return Problem(
        run,
        inputs={
            "per_step": draw.rounded(draw.normal(layout.num_steps)),
            "upstream": draw.rounded(upstream),
        },
        unread={"per_step": layout.step_lengths == 0, "upstream": layout.step_ids < 0},
    )


CASES: tuple[Case, ...] = (Case("broadcast_to_tokens", "", _problem),)
