"""Whether steps end where the token ids say that turns end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..backends.untraced import untraced
from .markers import token_set
from .step_layout import StepLayout, require_layout


@untraced
def check_step_ends(
    layout: StepLayout, token_ids: Tensor, end: int | Tensor | Sequence[int]
) -> None:
    """Raise if a layout and its token ids cannot both be right: a mask that is off by one.

    A policy stops at the token that ends its turn, so that this is the last token of a step, or
    none of it where the turn was cut off. Three mistakes in a mask leave all shapes as they are and
    show by that alone: a mask that is shifted by one, one that lacks the last token of each turn
    (``ids != pad`` where the end of a turn is also what pads), and turns without a gap between
    them, which became one step. Call it once on a batch in which some turn ended by itself, before
    training. It waits for the device.

    Args:
        layout: the steps, of the positions of `token_ids`.
        token_ids: int, of the token shape.
        end: the token id that ends a turn, e.g. of ``<|im_end|>``, or several of which each does.

    Raises:
        ValueError: the layout has one of these mistakes, or there is no end token; also for other
            wrong arguments.
        TypeError: naming the argument.

    Example:
        >>> import torch
        >>> from steppo_kernels import StepLayout, check_step_ends
        >>> ids = torch.tensor([[5, 7, 8, 2, 6, 9, 2]])
        >>> check_step_ends(StepLayout.from_mask(torch.tensor([[0, 1, 1, 1, 0, 1, 1]])), ids, end=2)
        >>> shifted = StepLayout.from_mask(torch.tensor([[1, 1, 1, 0, 1, 1, 0]]))
        >>> check_step_ends(shifted, ids, end=2)
        Traceback (most recent call last):
        ValueError: layout: got no step that ends with an end token and 2 that stop right before ...
    """
    steps = require_layout(layout)
    ids = checks.token_ids("token_ids", token_ids, steps.shape, steps.device)
    ends = token_set("end", end)
    if not ends:
        raise ValueError("end: got an empty sequence, expected at least one token id")
    is_end = torch.isin(ids, torch.tensor(ends, dtype=torch.int64, device=steps.device))
    lengths = steps.step_offsets.diff()
    slots = steps.step_offsets[1:][lengths > 0] - 1
    last = steps.token_index[slots]
    inside = is_end[steps.token_index]
    inside[slots] = False
    # The token that follows the last of a step in its row.
    rows = torch.searchsorted(steps.row_offsets, last, right=True)
    following = last + 1
    has_next = following < steps.row_offsets[rows]
    is_missed = has_next & is_end[torch.where(has_next, following, last)]
    is_late = inside[(slots - 1).clamp_min(0)] & (lengths[lengths > 0] > 1)
    found = (is_end, inside, is_late, is_end[last], is_missed & ~is_end[last])
    num_ends, num_inside, num_late, num_ended, num_missed = torch.stack(
        [x.sum() for x in found]
    ).tolist()
    if num_inside and num_inside == num_late:
        raise ValueError(
            f"layout: got {num_late} steps with one token behind an end token, expected the end "
            "token to be the last: the mask is shifted by one to the right, or has a token that "
            "the template puts behind each turn"
        )
    if num_inside:
        step = int(steps.step_ids.view(-1)[steps.token_index[inside]][0])
        raise ValueError(
            f"layout: got an end token inside of step {step}, in row {int(steps.step_rows[step])}, "
            "expected it to be the last of a step: turns without a gap between them are one run of "
            "a mask. Mark where the later ones begin in boundaries, or use from_markers"
        )
    if num_missed and not num_ended:
        raise ValueError(
            f"layout: got no step that ends with an end token and {num_missed} that stop right "
            "before one, expected the end token, which the policy wrote, to be part of the step: "
            "the mask is shifted by one to the left, or was made by comparing ids with a padding "
            "id that also ends turns. Make it of lengths, or by from_markers with the attention "
            "mask as valid"
        )
    if len(slots) and not num_ends:
        raise ValueError(
            f"end: got {ends}, of which nothing occurs in token_ids, expected the tokens that end "
            "a turn there, such as <|im_end|>, and a batch in which some turn ended by itself"
        )
