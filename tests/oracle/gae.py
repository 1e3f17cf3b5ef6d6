"""Step-level GAE in plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from oracle.layout import OracleLayout


class Advantages(NamedTuple):
    """The numbers of each step; 0 where it belongs to no trajectory.

    Attributes:
        advantages: whitened if that was asked for.
        returns: raw advantage + value.
        spread: standard deviation that whitening divided by, 1 where it did not divide.
    """

    advantages: list[float]
    returns: list[float]
    spread: float


def step_rewards(rewards: Sequence[float], layout: OracleLayout) -> list[float]:
    """Sum token rewards into steps."""
    owners = layout.step_ids
    sums = [0.0] * len(layout.steps)
    for at in range(layout.size):
        if owners[at] >= 0:
            sums[owners[at]] += rewards[at]
        elif at in layout.homes and math.isfinite(rewards[at]):
            sums[layout.homes[at]] += rewards[at]
    return sums


def step_gae(
    rewards: Sequence[float],
    values: Sequence[float],
    layout: OracleLayout,
    *,
    gamma: float,
    lam: float,
    bootstrap_values: Sequence[float] | None = None,
    whiten: bool = True,
    per_token_rewards: bool = False,
    per_token_values: bool = False,
) -> Advantages:
    """Return the advantages and returns of the steps.

    Args:
        rewards: of each step, or with `per_token_rewards` of each position.
        values: of each step, or with `per_token_values` of each position.
        layout: the steps.
        gamma: discount factor.
        lam: GAE factor.
        bootstrap_values: value behind the last step of each trajectory.
        whiten: whether advantages are shifted and scaled.
    """
    earned = step_rewards(rewards, layout) if per_token_rewards else rewards
    advantages = [0.0] * len(layout.steps)
    returns = [0.0] * len(layout.steps)
    members = []
    for trajectory, steps in enumerate(layout.trajectories):
        following = 0.0 if bootstrap_values is None else bootstrap_values[trajectory]
        running = 0.0
        for step in reversed(steps):
            value = values[layout.states[step]] if per_token_values else values[step]
            running = earned[step] + gamma * following - value + gamma * lam * running
            following = value
            advantages[step] = running
            returns[step] = running + value
            members.append(step)
    if not whiten or not members:
        return Advantages(advantages, returns, 1.0)
    mean = math.fsum(advantages[step] for step in members) / len(members)
    spread = 0.0
    if len(members) > 1:
        squares = math.fsum((advantages[step] - mean) ** 2 for step in members)
        spread = math.sqrt(squares / (len(members) - 1))
    divisor = spread + 1e-8 if spread > 0 else 1.0
    for step in members:
        advantages[step] = (advantages[step] - mean) / divisor
    return Advantages(advantages, returns, divisor)
