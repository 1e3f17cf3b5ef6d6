"""Cases of `step_gae`."""

from __future__ import annotations

import torch

from ...backends.choice import Backend
from ...losses.gae import step_gae
from .case import Case, Inputs, Outputs, Problem
from .draw import Draw
from .layouts import random_layout


def _case(variant: str, *, per_token: bool, bootstrap: bool, whiten: bool) -> Case:
    def draw_problem(draw: Draw) -> Problem:
        layout = random_layout(draw)
        shape = layout.shape if per_token else torch.Size((layout.num_steps,))
        device = layout.device
        inputs = {
            "rewards": draw.rounded(draw.normal(*shape)),
            "values": draw.rounded(draw.normal(*shape)),
        }
        outside = torch.ones(layout.num_steps, dtype=torch.bool, device=device)
        outside[layout.trajectory_steps] = False
        if per_token:
            # A finite reward beside the actions counts, so only some of those slots are void.
            beside = (layout.step_ids < 0) & draw.flags(0.5, *shape)
            states = torch.ones(shape.numel(), dtype=torch.bool, device=device)
            if len(states):
                # Rows without a token are empty steps, whose states are no token's.
                states[layout.state_index[~outside]] = False
            unread = {"rewards": beside, "values": states.view(shape)}
            inputs["rewards"] = inputs["rewards"].masked_fill(beside, 0)
        else:
            unread = {"rewards": outside, "values": outside}
        if bootstrap:
            # Trajectories end or are cut off.
            last = draw.normal(layout.num_trajectories) * draw.flags(0.5, layout.num_trajectories)
            inputs["bootstrap_values"] = draw.rounded(last)
        gamma, lam = draw.choice(((0.99, 1.0), (1.0, 0.95), (0.9, 0.8), (0.0, 0.0)))

        def run(inputs: Inputs, backend: Backend) -> Outputs:
            found = step_gae(
                inputs["rewards"],
                inputs["values"],
                layout,
                gamma=gamma,
                lam=lam,
                whiten=whiten,
                bootstrap_values=inputs.get("bootstrap_values"),
                backend=backend,
            )
            return {"advantages": found.advantages, "returns": found.returns}

        return Problem(run, inputs, unread)

    return Case("step_gae", variant, draw_problem)


CASES: tuple[Case, ...] = (
    _case("per step", per_token=False, bootstrap=False, whiten=True),
    _case("per step, bootstrap, raw", per_token=False, bootstrap=True, whiten=False),
    _case("per token", per_token=True, bootstrap=False, whiten=True),
    _case("per token, bootstrap, raw", per_token=True, bootstrap=True, whiten=False),
)
