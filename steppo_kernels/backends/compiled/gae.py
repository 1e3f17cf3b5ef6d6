"""Step-level GAE in C++."""

from __future__ import annotations

from torch import Tensor

from .launch import dtype_code, kernels, pointer, threads


def step_gae(
    rewards: Tensor,
    values: Tensor,
    rewards_per_token: bool,
    values_per_token: bool,
    step_ids: Tensor,
    row_offsets: Tensor,
    state_index: Tensor,
    trajectory_steps: Tensor,
    trajectory_offsets: Tensor,
    bootstrap_values: Tensor | None,
    gamma: float,
    lam: float,
    whiten: bool,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns ``[S]``: the operator `step_gae`."""
    num_steps = state_index.numel()
    advantages, returns = values.new_empty(num_steps), values.new_empty(num_steps)
    kernels.step_gae(
        dtype_code(values),
        pointer(rewards),
        pointer(values),
        rewards_per_token,
        values_per_token,
        pointer(step_ids),
        pointer(row_offsets),
        pointer(state_index),
        pointer(trajectory_steps),
        pointer(trajectory_offsets),
        pointer(bootstrap_values),
        gamma,
        lam,
        whiten,
        step_ids.numel(),
        row_offsets.numel() - 1,
        num_steps,
        trajectory_steps.numel(),
        trajectory_offsets.numel() - 1,
        pointer(advantages),
        pointer(returns),
        threads(),
    )
    return advantages, returns
