"""Step-level GAE in plain PyTorch (StepPO, arXiv 2604.18401, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..records import Timeline, record


def step_gae(
    rewards: Tensor,
    values: Tensor,
    bootstrap_values: Tensor | None,
    timeline: Sequence[Tensor],
    config: Sequence[float],
    rewards_per_token: bool,
    values_per_token: bool,
    along_rows: bool,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns ``[S]``: the operator `step_gae`."""
    line = record(Timeline, timeline)
    gamma, lam, whiten = config
    trajectory_steps, trajectory_offsets = line.trajectory_steps, line.trajectory_offsets
    num_steps = line.state_index.shape[0]
    if rewards_per_token:
        rewards = step_rewards(
            rewards.reshape(-1), line.step_ids.reshape(-1), line.row_offsets, num_steps
        )
    if values_per_token:
        values = at_states(values, line.state_index)
    lengths = trajectory_offsets.diff()
    groups, longest = lengths.numel(), int(lengths.max()) if lengths.numel() else 0

    # Trajectories side by side, [G, longest]; a slot past a trajectory's end is never read.
    slot = torch.arange(longest, device=values.device)
    taken = slot < lengths[:, None]
    table = torch.zeros((groups, longest), dtype=torch.int64, device=values.device)
    table[taken] = trajectory_steps
    v = torch.where(taken, values[table], 0.0) if num_steps else values.new_zeros(table.shape)
    r = torch.where(taken, rewards[table], 0.0) if num_steps else v
    advantage = torch.zeros_like(v)
    next_value = values.new_zeros(groups) if bootstrap_values is None else bootstrap_values
    next_advantage = values.new_zeros(groups)
    for t in range(longest - 1, -1, -1):
        delta = r[:, t] + gamma * next_value - v[:, t]
        advantage[:, t] = delta + gamma * lam * next_advantage
        next_value = torch.where(taken[:, t], v[:, t], next_value)
        next_advantage = torch.where(taken[:, t], advantage[:, t], next_advantage)

    raw = advantage[taken]
    advantages, returns = values.new_zeros(num_steps), values.new_zeros(num_steps)
    returns[trajectory_steps] = raw + v[taken]
    advantages[trajectory_steps] = whitened(raw) if whiten else raw
    return advantages, returns


def at_states(values: Tensor, state_index: Tensor) -> Tensor:
    """Return the values of the steps' states, N of any shape to ``[S]``; of no tokens, zeros."""
    if values.numel() == 0:
        return values.new_zeros(state_index.shape[0]) + values.sum()
    return values.reshape(-1)[state_index]


def step_rewards(rewards: Tensor, step_ids: Tensor, row_offsets: Tensor, num_steps: int) -> Tensor:
    """Add up ``[N]`` token rewards by step, ``[S]``.

    A reward on a non-action token goes to the latest step before it in its row, else to the first
    one; in a row without a step it is lost. There it must be finite to count, as such a slot may
    hold anything.
    """
    total = rewards.new_zeros(num_steps)
    if rewards.numel() == 0 or num_steps == 0:
        return total
    position = torch.arange(rewards.numel(), device=rewards.device)
    action = step_ids >= 0
    row = torch.searchsorted(row_offsets, position, right=True) - 1
    latest = torch.where(action, position, -1).cummax(0).values
    following = torch.where(action, position, rewards.numel()).flip(0).cummin(0).values.flip(0)
    owner = torch.where(latest >= row_offsets[row], latest, following)
    owned = owner < row_offsets[row + 1]
    counts = owned & (action | rewards.isfinite())
    step = step_ids[owner[counts]].to(torch.int64)
    return total.index_put((step,), rewards[counts], accumulate=True)


def whitened(values: Tensor) -> Tensor:
    """Return (x - mean) / (std + 1e-8) with the unbiased std, x - mean of fewer than 2.

    In fp64: an fp32 mean of equal values is off by about as much as the 1e-8.
    """
    if values.numel() == 0:
        return values
    centered = values.double() - values.double().mean()
    if values.numel() > 1:
        centered = centered / (centered.square().sum() / (values.numel() - 1)).sqrt().add(1e-8)
    return centered.to(values.dtype)
