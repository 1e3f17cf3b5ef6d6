"""The steps of masks, as trainers have them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout.step_layout import StepLayout


def layout_of(mask: Tensor, *, rows_are_steps: bool) -> StepLayout:
    """Return the layout of a bool mask ``[B, T]``.

    Args:
        mask: the action tokens.
        rows_are_steps: whether a row is one step, whose mask may have gaps, and none where it has
            no token. False: every run of ones is a step.
    """
    if rows_are_steps:
        return StepLayout.from_step_ids(torch.where(mask, 0, -1))
    return StepLayout.from_mask(mask)
