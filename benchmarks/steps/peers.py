"""The code that the package is compared with.

verl's functions are used where verl can be imported, as in the environment of `make bench`. What
stands here under the same names is then held to them before anything is timed, and takes their
place elsewhere. The step GAE of the StepPO authors is not part of a published package;
`step_gae_tables` does what it does, the way it does it.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


@functools.cache
def verl() -> Any | None:
    """Return ``verl.trainer.ppo.core_algos``, or None without verl."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("verl.trainer.ppo.core_algos")
    except ImportError:
        return None


@functools.cache
def versions() -> dict[str, str | None]:
    """Return the version of each peer, None without it."""
    return {"verl": None if verl() is None else importlib.import_module("verl").__version__}


def verl_gspo(clip_low: float, clip_high: float) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """Return verl's gspo policy loss with its configuration bound."""
    core = verl()
    if core is None:
        raise RuntimeError("verl: not installed, see the group `bench` of pyproject.toml")
    config = importlib.import_module("verl.workers.config")
    actor = config.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=clip_low,
        clip_ratio_low=clip_low,
        clip_ratio_high=clip_high,
        loss_agg_mode="seq-mean-token-mean",
        policy_loss=config.PolicyLossConfig(loss_mode="gspo"),
    )
    return functools.partial(
        core.get_policy_loss_fn("gspo"), config=actor, loss_agg_mode="seq-mean-token-mean"
    )


def token_gae_loop(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Token-level GAE, one token of all rows at a time, as trainers do it.

    `rewards`, `values` ``[B, T]``; `mask` int ``[B, T]``. Masked tokens pass on what they got.
    """
    with torch.no_grad():
        keep = mask.to(values.dtype)
        next_value = values.new_zeros(values.shape[0])
        running = values.new_zeros(values.shape[0])
        columns = []
        for t in range(values.shape[1] - 1, -1, -1):
            here = keep[:, t]
            delta = rewards[:, t] + gamma * next_value - values[:, t]
            running = here * (delta + gamma * lam * running) + (1 - here) * running
            next_value = here * values[:, t] + (1 - here) * next_value
            columns.append(running)
        columns.reverse()
        advantages = torch.stack(columns, dim=1)
        returns = advantages + values
        count = keep.sum()
        mean = (advantages * keep).sum() / count
        variance = ((advantages - mean).square() * keep).sum() / (count - 1)
        return (advantages - mean) * torch.rsqrt(variance + 1e-8), returns


def step_gae_tables(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    trajectory_uids: np.ndarray[Any, Any],
    step_indices: np.ndarray[Any, Any],
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Step-level GAE by the method of the StepPO authors.

    One row a step. Rewards are summed over the response, the value is that of column 0, both are
    scattered into tables [trajectory, step], and the recursion walks the table backwards. The
    advantages are whitened over all rows, and both results are spread over the response again.

    `rewards`, `values` fp32 and `mask` int64 ``[N, R]``; `trajectory_uids` strings and
    `step_indices` int32 ``[N]``. Returns two ``[N, R]``.
    """
    with torch.no_grad():
        step_rewards = (rewards * mask).sum(dim=-1)
        step_values = values[:, 0]
        names, numbers = np.unique(trajectory_uids, return_inverse=True)
        trajectory = torch.from_numpy(numbers.astype(np.int64))
        step = torch.from_numpy(step_indices.astype(np.int64))
        shape = len(names), int(step.max()) + 1
        reward_table, value_table = step_rewards.new_zeros(shape), step_values.new_zeros(shape)
        reward_table[trajectory, step] = step_rewards
        value_table[trajectory, step] = step_values
        advantage_table = torch.zeros_like(reward_table)
        running = step_rewards.new_zeros(shape[0])
        next_value = step_values.new_zeros(shape[0])
        for t in range(shape[1] - 1, -1, -1):
            delta = reward_table[:, t] + gamma * next_value - value_table[:, t]
            running = delta + gamma * lam * running
            advantage_table[:, t] = running
            next_value = value_table[:, t]
        advantages = advantage_table[trajectory, step]
        returns = advantages + step_values
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        return advantages[:, None] * mask, returns[:, None] * mask
