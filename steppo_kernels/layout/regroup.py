"""The same batch in other steps: by token, by trajectory, without some of its tokens.

Rewards that lie on no action token must reach the right step in each of these. The array
`StepTensors.reward_index` says which. It is stored where the rule of plain layouts, by which the
action tokens of a row tell the step, would give another one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import csr
from ..backends.reference.segment import step_starts
from .step_tensors import StepTensors


def per_token(steps: StepTensors) -> StepTensors:
    """Make every action token a step."""
    device, num_tokens = steps.device, steps.num_tokens
    step_ids = torch.full_like(steps.step_ids, -1)
    ranks = torch.arange(num_tokens, device=device, dtype=torch.int32)
    step_ids.view(-1)[steps.token_index] = ranks
    lengths = steps.step_lengths.to(torch.int64)[steps.trajectory_steps]
    members = csr.ranges(steps.step_offsets[steps.trajectory_steps], lengths)
    offsets = csr.prefix(lengths)[steps.trajectory_offsets]
    ones = torch.ones(num_tokens, dtype=torch.int32, device=device)
    rewards = (None, None) if steps.reward_index is None else _rewards_of_tokens(steps)
    return StepTensors(
        step_ids=step_ids,
        token_index=steps.token_index,
        step_offsets=torch.arange(num_tokens + 1, device=device),
        step_lengths=ones,
        step_starts=steps.token_index,
        trajectory_steps=members,
        trajectory_offsets=offsets,
        trajectory_counts=csr.count_nonempty(ones, members, offsets, num_tokens),
        state_index=steps.token_index,
        step_rows=csr.group_of(steps.token_index, steps.row_offsets),
        row_offsets=steps.row_offsets,
        reward_index=rewards[0],
        reward_offsets=rewards[1],
        along_rows=steps.along_rows,
    )


def per_trajectory(steps: StepTensors) -> StepTensors:
    """Make every trajectory a step; one without steps becomes an empty step of no trajectory."""
    device = steps.device
    members, groups = steps.trajectory_steps, steps.num_trajectories
    lengths = steps.step_lengths.to(torch.int64)[members]
    offsets = csr.prefix(lengths)[steps.trajectory_offsets]
    owner = torch.repeat_interleave(
        torch.arange(groups, device=device, dtype=torch.int32), offsets.diff()
    )
    index = steps.token_index[csr.ranges(steps.step_offsets[members], lengths)]
    step_ids = torch.full_like(steps.step_ids, -1)
    step_ids.view(-1)[index] = owner
    has_steps = steps.trajectory_offsets.diff() > 0
    kept = has_steps.nonzero().squeeze(1)
    first = members[steps.trajectory_offsets[:-1][kept]]
    state_index = torch.zeros(groups, dtype=torch.int64, device=device)
    state_index[kept] = steps.state_index[first]
    # Only where trajectories are rows may one be without steps.
    own_rows = torch.arange(groups, device=device)
    own_rows[kept] = steps.step_rows[first]
    step_lengths = offsets.diff().to(torch.int32)
    rewards: tuple[Tensor | None, Tensor | None] = None, None
    if steps.reward_index is not None and steps.reward_offsets is not None:
        rewards = (
            steps.reward_index[_in_time_order(steps, steps.reward_offsets)],
            csr.prefix(steps.reward_offsets.diff()[members])[steps.trajectory_offsets],
        )
    return StepTensors(
        step_ids=step_ids,
        token_index=index,
        step_offsets=offsets,
        step_lengths=step_lengths,
        step_starts=step_starts(index, offsets),
        trajectory_steps=kept,
        trajectory_offsets=csr.prefix(has_steps.to(torch.int64)),
        trajectory_counts=(step_lengths > 0).to(torch.int32),
        state_index=state_index,
        step_rows=csr.rows_of_steps(index, offsets, steps.row_offsets, own_rows),
        row_offsets=steps.row_offsets,
        reward_index=rewards[0],
        reward_offsets=rewards[1],
        along_rows=steps.along_rows,
    )


def keep(steps: StepTensors, mask: Tensor) -> StepTensors:
    """Drop the tokens where `mask` (bool, of the token shape) is False; steps keep their place."""
    kept = mask.reshape(-1)[steps.token_index]
    step_offsets = csr.prefix(kept.to(torch.int64))[steps.step_offsets]
    step_lengths = step_offsets.diff().to(torch.int32)
    token_index = steps.token_index[kept]
    reward_index, reward_offsets = _rewards(steps)
    return steps._replace(
        step_ids=torch.where(mask, steps.step_ids, -1),
        token_index=token_index,
        step_offsets=step_offsets,
        step_lengths=step_lengths,
        step_starts=step_starts(token_index, step_offsets),
        trajectory_counts=csr.count_nonempty(
            step_lengths, steps.trajectory_steps, steps.trajectory_offsets, steps.num_steps
        ),
        step_rows=csr.rows_of_steps(token_index, step_offsets, steps.row_offsets, steps.step_rows),
        reward_index=reward_index,
        reward_offsets=reward_offsets,
    )


def shifted_left(steps: StepTensors) -> StepTensors:
    """Move every action token to the place before it; the states and rewards stay where they are.

    No step may have a token at the first place.
    """
    flat = steps.step_ids.reshape(-1).roll(-1)
    token_index = steps.token_index - 1
    return steps._replace(
        step_ids=flat.view(steps.shape),
        token_index=token_index,
        step_starts=step_starts(token_index, steps.step_offsets),
    )


def padded_left(steps: StepTensors, columns: int) -> StepTensors:
    """Put so many places that are no action's before each row of a batch ``[B, T]``, T > 0."""
    rows, width = steps.shape
    padding = steps.step_ids.new_full((rows, columns), -1)

    def moved(index: Tensor) -> Tensor:
        return index + (index // width + 1) * columns

    token_index = moved(steps.token_index)
    return steps._replace(
        step_ids=torch.cat((padding, steps.step_ids), 1),
        token_index=token_index,
        step_starts=step_starts(token_index, steps.step_offsets),
        state_index=moved(steps.state_index),
        # What is before a row of the batch becomes a part of it.
        row_offsets=steps.row_offsets + -(-steps.row_offsets // width) * columns,
        reward_index=None if steps.reward_index is None else moved(steps.reward_index),
    )


def with_rewards_of_rows(steps: StepTensors) -> StepTensors:
    """Give every step of a trajectory the rewards of its whole row, if one of them is empty.

    An empty step has no token that says where its rewards lie. Step s must be row s.
    """
    members = steps.trajectory_steps
    if not bool((steps.step_lengths[members] == 0).any()):
        return steps
    lengths = torch.zeros(steps.num_steps, dtype=torch.int64, device=steps.device)
    lengths[members] = steps.row_offsets.diff()[members]
    return steps._replace(
        reward_index=csr.ranges(steps.row_offsets[:-1], lengths),
        reward_offsets=csr.prefix(lengths),
    )


def _rewards(steps: StepTensors) -> tuple[Tensor, Tensor]:
    """Return which rewards each step takes: as stored, or by the rule of plain layouts."""
    if steps.reward_index is not None and steps.reward_offsets is not None:
        return steps.reward_index, steps.reward_offsets
    is_action = steps.step_ids.view(-1) >= 0
    return _rewards_at(steps, csr.nearest_before_else_after(is_action, steps.row_offsets))


def _rewards_at(steps: StepTensors, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the CSR array by which each flat position's reward goes to the step at its anchor."""
    ranks = torch.full_like(anchors, -1)
    ranks[steps.token_index] = torch.arange(steps.num_tokens, device=steps.device)
    # Ranks of tokens ascend with steps and, within a step, with time.
    index, by_rank = csr.regrouped(ranks[anchors], steps.num_tokens)
    return index, by_rank[steps.step_offsets]


def _rewards_of_tokens(steps: StepTensors) -> tuple[Tensor, Tensor]:
    """Return which rewards each action token takes.

    Each position's reward goes to the last action token before it in its row, else to the next one
    there. In a row without any, the trajectory takes the place of the row.
    """
    assert steps.reward_index is not None
    assert steps.reward_offsets is not None
    line = steps.reward_index[_in_time_order(steps, steps.reward_offsets)]
    lengths = steps.reward_offsets.diff()[steps.trajectory_steps]
    trajectories = csr.prefix(lengths)[steps.trajectory_offsets]
    is_action = steps.step_ids.view(-1)[line] >= 0
    # The positions of a row follow each other, and no two trajectories share a row.
    _, counts = torch.unique_consecutive(csr.group_of(line, steps.row_offsets), return_counts=True)
    home = csr.nearest_before_else_after(is_action, csr.prefix(counts))
    in_trajectory = csr.nearest_before_else_after(is_action, trajectories)
    home = torch.where(is_action[home], home, in_trajectory)
    ranks = torch.full((steps.step_ids.numel(),), -1, dtype=torch.int64, device=steps.device)
    ranks[steps.token_index] = torch.arange(steps.num_tokens, device=steps.device)
    order, offsets = csr.regrouped(ranks[line[home]], steps.num_tokens)
    return line[order], offsets


def _in_time_order(steps: StepTensors, offsets: Tensor) -> Tensor:
    """Return the members of a CSR array by step, trajectory by trajectory in time order."""
    members = steps.trajectory_steps
    return csr.ranges(offsets[members], offsets.diff()[members])
