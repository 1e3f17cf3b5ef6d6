"""Cases of what takes the place of a critic: `step_returns` and `group_normalize`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.choice import Backend
from ...losses.group_normalize import group_normalize
from ...losses.returns import step_returns
from .batch import ON_TOKENS, token_batch
from .case import FORWARD, Case, Inputs, Problem, Size, first_as, nbytes

# Trajectories of one prompt.
_GROUP = 8


def _returns(size: Size, device: torch.device) -> Problem:
    batch = token_batch(size, device)
    layout = batch.layout

    def call(inputs: Inputs, backend: Backend) -> Tensor:
        return step_returns(inputs["rewards"], layout, gamma=0.95, backend=backend)

    # The rewards of all tokens and where the steps begin, and the result.
    moved = nbytes(batch.rewards, layout.step_offsets) + batch.rewards.itemsize * layout.num_steps
    return Problem(
        call,
        {"rewards": batch.rewards},
        first_as("returns"),
        moved=moved,
        why_not_compiled="the loop over the steps of a trajectory ends where the longest does",
    )


def _normalized(size: Size, device: torch.device) -> Problem:
    batch = token_batch(size, device)
    layout = batch.layout
    groups = torch.arange(size.rows, device=device) // _GROUP

    def call(inputs: Inputs, backend: Backend) -> Tensor:
        return group_normalize(inputs["values"], groups, layout=layout, backend=backend)

    # The number of a step, its row and its result; what else is read depends on how it is done.
    return Problem(
        call,
        {"values": batch.advantages},
        first_as("advantages"),
        moved=2 * batch.advantages.nbytes + nbytes(layout.step_rows),
    )


CASES: tuple[Case, ...] = (
    Case("step_returns", FORWARD, ON_TOKENS, _returns),
    Case("group_normalize", FORWARD, ON_TOKENS, _normalized),
)
