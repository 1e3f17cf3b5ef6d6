"""Batches and actor configs as verl hands them to a policy loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig

from steppo_kernels.integrations.verl import StepPOPolicyLossConfig

# Of the whole mini-batch: more rows and tokens than the call has, as of a micro-batch.
MINI_BATCHES: dict[str, dict[str, Any]] = {
    "alone": {},
    "part": {"dp_size": 2, "batch_num_tokens": 777, "global_batch_size": 31},
    "part-scaled": {
        "dp_size": 2,
        "batch_num_tokens": 777,
        "global_batch_size": 31,
        "loss_scale_factor": 50,
    },
}
WEIGHTS = ("none", "row", "token")


class Batch(NamedTuple):
    """What a policy loss takes per token, ``[B, R]``."""

    log_prob: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    response_mask: Tensor
    rollout_is_weights: Tensor | None

    def to(self, dtype: torch.dtype) -> Batch:
        """The same numbers in another precision; the mask stays."""
        floats = [None if x is None else x.to(dtype) for x in self]
        return Batch(*floats)._replace(response_mask=self.response_mask)


def draw(
    seed: int,
    *,
    weights: str = "none",
    varying: bool = False,
    gaps: bool = False,
    mask_dtype: torch.dtype = torch.bool,
    shape: tuple[int, int] = (12, 20),
    spread: float = 0.1,
) -> Batch:
    """Rows of several lengths, one of them without any action token, as padding is."""
    made = torch.Generator().manual_seed(seed)
    rows, width = shape
    lengths = torch.randint(1, width + 1, (rows, 1), generator=made)
    lengths[rows // 4] = 0
    mask = torch.arange(width)[None] < lengths
    if gaps:
        mask &= torch.rand(shape, generator=made) < 0.6
    old = 0.3 * torch.randn(shape, generator=made) - 1
    per_row = torch.randn(rows, 1, generator=made).expand(shape)
    advantages = torch.randn(shape, generator=made) if varying else per_row
    factors = {
        "none": None,
        "row": (0.5 + torch.rand(rows, 1, generator=made)).expand(shape),
        "token": 0.5 + torch.rand(shape, generator=made),
    }[weights]
    new = old + spread * torch.randn(shape, generator=made)
    return Batch(new, old, advantages * mask, mask.to(mask_dtype), factors)


def actor(
    mode: str = "seq-mean-token-mean",
    mini_batch: dict[str, Any] | None = None,
    low: float = 0.03,
    high: float = 0.04,
    loss: PolicyLossConfig | None = None,
    **options: Any,
) -> ActorConfig:
    """An actor config, as the engine workers make it."""
    made = ActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=low,
        clip_ratio_high=high,
        loss_agg_mode=mode,
        policy_loss=loss or StepPOPolicyLossConfig(),
        **options,
    )
    made.global_batch_info.update(mini_batch or {})
    return made


class Answer(NamedTuple):
    """A loss, its gradient by the log-probs, and its metrics."""

    loss: Tensor
    gradient: Tensor
    metrics: dict[str, Any]


def answer(name: str, batch: Batch, config: ActorConfig) -> Answer:
    """What verl gets from a registered policy loss, and does to it as `ppo_loss` does."""
    log_prob = batch.log_prob.clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(name)(
        old_log_prob=batch.old_log_prob,
        log_prob=log_prob,
        advantages=batch.advantages,
        response_mask=batch.response_mask,
        loss_agg_mode=config.loss_agg_mode,
        config=config,
        rollout_is_weights=batch.rollout_is_weights,
    )
    value = loss.detach().clone()
    # verl adds entropy and KL in place.
    loss -= 0.0 * value
    loss += 0.0 * value
    (gradient,) = torch.autograd.grad(loss, log_prob)
    return Answer(value, gradient, metrics)


def relative_error(found: Answer, wanted: Answer) -> float:
    """The larger of the errors of loss and gradient, each by its own largest number."""
    loss = (found.loss - wanted.loss).abs() / wanted.loss.abs().clamp_min(1e-6)
    scale = wanted.gradient.abs().max().clamp_min(1e-12)
    gradient = (found.gradient - wanted.gradient).abs().max() / scale
    return max(loss.item(), gradient.item())
