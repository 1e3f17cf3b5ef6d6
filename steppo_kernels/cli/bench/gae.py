"""Cases of `step_gae`."""

from __future__ import annotations

import torch

from ...backends.choice import Backend
from ...losses.gae import step_gae
from ...outputs import StepAdvantages
from .batch import ON_TOKENS, token_batch
from .case import FORWARD, Case, Inputs, Outputs, Problem, Size, nbytes


def _problem(size: Size, device: torch.device) -> Problem:
    batch = token_batch(size, device)
    layout = batch.layout

    def call(inputs: Inputs, backend: Backend) -> StepAdvantages:
        return step_gae(inputs["rewards"], inputs["values"], layout, lam=0.95, backend=backend)

    # The rewards of all tokens and where the steps begin; of each step, where its state is and the
    # value there, and the two results.
    number = batch.values.itemsize
    return Problem(
        call,
        {"rewards": batch.rewards, "values": batch.values},
        _outputs,
        moved=nbytes(batch.rewards, layout.step_offsets, layout.state_index)
        + 3 * number * layout.num_steps,
        why_not_compiled="the loop over the steps of a trajectory ends where the longest does",
    )


def _outputs(found: StepAdvantages) -> Outputs:
    return {"advantages": found.advantages, "returns": found.returns}


CASES: tuple[Case, ...] = (Case("step_gae", FORWARD, ON_TOKENS, _problem),)
