"""Layouts of the states that predict the action tokens of another layout."""

from __future__ import annotations

import torch

from ..inference import outside_inference_mode
from . import regroup
from .step_layout import StepLayout, layout_of, require_layout


@outside_inference_mode
def padded_left(layout: StepLayout, shape: torch.Size, columns: int) -> StepLayout:
    """Return the layout with so many places that are no action's before each row.

    Args:
        layout: the steps.
        shape: ``[B, T]``, with T > 0 and as many places as the layout has.
        columns: how many.
    """
    held = require_layout(layout)
    held = held._replace(step_ids=held.step_ids.view(shape))
    return layout_of(regroup.padded_left(held, columns))


@outside_inference_mode
def shifted_left(layout: StepLayout) -> StepLayout:
    """Return the layout with every action token at the place before its own.

    No step may have a token at the first place.
    """
    return layout_of(regroup.shifted_left(require_layout(layout)))
