"""The code that the package is compared with.

Functions of verl and TRL are used where these can be imported, as in the environment of
`make bench`. What stands here for them is then held to them before anything is timed, and takes
their place elsewhere. The step GAE of the StepPO authors is not part of a published package;
`step_gae_tables` does what it does, the way it does it.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import steppo_kernels as sk

from ..variants import Variant
from .variants import TRL_FORMULA


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
def trl() -> Any | None:
    """Return ``trl.trainer.grpo_trainer``, or None without TRL."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("trl.trainer.grpo_trainer")
    except ImportError:
        return None


@functools.cache
def versions() -> dict[str, str | None]:
    """Return the version of each peer, None without it."""
    found = {"verl": verl(), "trl": trl()}
    return {name: None if found[name] is None else metadata.version(name) for name in found}


def available(variants: Iterable[Variant]) -> list[Variant]:
    """Return the variants whose project is there; a stand-in only where its project is not."""
    found = versions()
    return [
        variant
        for variant in variants
        if (variant.project is None or found[variant.project])
        and (variant != TRL_FORMULA or not found["trl"])
    ]


def verl_loss(mode: str, config: sk.StepPOConfig) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """Return a policy loss of verl, ``gspo`` or ``vanilla``, with its configuration bound.

    `vanilla` always has a dual clip, at a ratio of 3 by default, which no ratio here comes near.
    """
    core = verl()
    if core is None:
        raise RuntimeError("verl: not installed, see the group `bench` of pyproject.toml")
    module = importlib.import_module("verl.workers.config")
    aggregation = {"step_mean": "seq-mean-token-mean", "token_mean": "token-mean"}[config.reduction]
    actor = module.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=config.clip_low,
        clip_ratio_low=config.clip_low,
        clip_ratio_high=config.clip_high,
        loss_agg_mode=aggregation,
        policy_loss=module.PolicyLossConfig(loss_mode=mode),
    )
    return functools.partial(core.get_policy_loss_fn(mode), config=actor, loss_agg_mode=aggregation)


def verl_rollout_weights() -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """Return verl's truncated weights, with all that it logs of them."""
    module = importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
    found: Callable[..., tuple[Tensor, dict[str, float]]] = (
        module.compute_rollout_correction_weights
    )
    return found


def trl_loss(
    x: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, config: sk.StepPOConfig
) -> Callable[[], Tensor]:
    """Return the loss of TRL's GRPO trainer at its defaults: token ratio, mean over tokens.

    The method is TRL's own, with all that it logs. It runs on an object that holds what it reads of
    a trainer. The model's part gives the log-probs; tokens of the environment are masked as those
    of tools are. There are no prompts, and ids that no loss reads are left empty, so that nothing
    is joined for a model that does not run.
    """
    module = trl()
    if module is None:
        raise RuntimeError("trl: not installed, see the group `bench` of pyproject.toml")
    rows = x.shape[0]
    none, ones = torch.empty((rows, 0), dtype=torch.int64), torch.ones((rows, 1), dtype=torch.int64)
    entropies = torch.zeros(x.shape)
    integers = mask.to(torch.int64)
    inputs = {
        "prompt_ids": none,
        "prompt_mask": none,
        "completion_ids": none,
        "completion_mask": ones,
        "tool_mask": integers,
        "advantages": advantages,
        "old_per_token_logps": old,
        "num_items_in_batch": integers.sum(),
    }
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (x, entropies, None),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda found: found, reduce=lambda found, reduction: found
        ),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        loss_type="dapo",
        importance_sampling_level="token",
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high,
        beta=0.0,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        current_gradient_accumulation_steps=1,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
    )

    def loss() -> Tensor:
        trainer._metrics = {"train": defaultdict(list)}
        found: Tensor = module.GRPOTrainer._compute_loss(trainer, None, inputs)
        return found

    return loss


def trl_formula(
    x: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, config: sk.StepPOConfig
) -> Callable[[], Tensor]:
    """Return the formula of `trl_loss`, without what TRL logs."""
    integers = mask.to(torch.int64)

    def loss() -> Tensor:
        ratio = torch.exp(x - old)
        clipped = torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high)
        per_token = -torch.min(ratio * advantages, clipped * advantages)
        return (per_token * integers).sum() / integers.sum().clamp(min=1.0)

    return loss


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
