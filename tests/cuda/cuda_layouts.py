"""Layouts of many kinds, whose steps lie in a batch in many ways."""

from __future__ import annotations

import torch

from steppo_kernels import StepLayout
from steppo_kernels.layout.step_layout import require_layout


def layout_of(form, shape, seed=0):
    """Return the tensors of a layout of a kind; the comments say what is special about it."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.6
    rows = shape[0]
    if form in ("rows", "trajectories"):
        valid = torch.rand(rows, generator=generator) < 0.8
        order = torch.randperm(rows, generator=generator).tolist()
        groups = [k % 3 for k in order]
        made = StepLayout.from_rows(mask, groups, order, valid=valid, backend="reference")
    elif form == "numbered":
        # Tokens of a step have others of no step between them.
        ids = torch.randint(0, 2, shape, generator=generator).cumsum(-1)
        made = StepLayout.from_step_ids(torch.where(mask, ids, -1), backend="reference")
    else:
        made = StepLayout.from_mask(mask, backend="reference")
    if form == "tokens":
        made = made.per_token()
    if form == "trajectories":
        # Steps of several rows, which take turns.
        made = made.per_trajectory()
    if form == "kept":
        # Steps that are empty.
        made = made.keep(torch.rand(shape, generator=generator) < 0.3)
    steps = require_layout(made)
    if form == "strangers":
        # Steps with tokens that are in no trajectory.
        is_kept = torch.rand(steps.num_steps, generator=generator) < 0.7
        members = steps.trajectory_steps
        before = torch.cat((torch.zeros(1, dtype=torch.int64), is_kept[members].cumsum(0)))
        steps = steps._replace(
            trajectory_steps=members[is_kept[members]],
            trajectory_offsets=before[steps.trajectory_offsets],
        )
    return steps
