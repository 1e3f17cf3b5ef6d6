"""The policy losses `steppo` and `capo` of verl's registry."""

from __future__ import annotations

from torch import Tensor
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.workers.config import ActorConfig

from ... import checks
from ...losses.policy_loss import steppo_loss
from ...outputs import Metrics
from ..masks import layout_of
from . import cautions
from .aggregation import aggregation_of
from .policy_config import loss_config, settings_of

# verl takes the mean of these over micro-batches and ranks, so that no extremes, counts or parts of
# a sum are among them. The first two stand under verl's own names.
_METRICS = {
    "actor/pg_clipfrac": "token_clip_fraction",
    "actor/ppo_kl": "approx_kl",
    "actor/step_clip_fraction": "clip_fraction",
    "actor/step_clip_fraction_low": "clip_fraction_low",
    "actor/step_clip_fraction_high": "clip_fraction_high",
    "actor/step_ratio_mean": "ratio_mean",
    "actor/approx_kl_k3": "approx_kl_k3",
    "actor/dead_token_fraction": "dead_token_fraction",
}


@register_policy_loss("steppo")
def steppo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return the step-level policy loss and its metrics (StepPO, arXiv 2604.18401).

    With the default settings, it is verl's ``gspo`` on rows that are steps, in every aggregation
    mode. Masked positions may hold anything.

    Args:
        old_log_prob: ``[B, R]``, log-probs of the tokens under the policy of the rollout.
        log_prob: ``[B, R]``, those of the current one. Half precision is warned of.
        advantages: ``[B, R]``, which may vary within a step.
        response_mask: ``[B, R]``, bool or 0/1 of any dtype: the action tokens.
        loss_agg_mode: verl's mode of aggregation.
        config: verl's actor config, of which this reads the bounds, `policy_loss` and
            `global_batch_info`.
        rollout_is_weights: ``[B, R]``, rollout correction of tokens or, constant in a row, of rows.

    Returns:
        A fresh 0-dim loss, and metrics by verl's names. With `global_batch_info`, the loss is the
        part of this call in that of the mini-batch.

    Raises:
        ValueError, TypeError: naming the argument or the setting.

    Example:
        >>> import torch
        >>> from verl.workers.config import ActorConfig
        >>> actor = ActorConfig(
        ...     strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        ...     clip_ratio_low=3e-4, clip_ratio_high=4e-4, loss_agg_mode="seq-mean-token-mean",
        ... )
        >>> from steppo_kernels.integrations.verl import steppo
        >>> log_prob, mask = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)
        >>> advantages = torch.tensor([[1.0], [-3.0]]).expand(2, 3)
        >>> loss, metrics = steppo(
        ...     torch.zeros(2, 3), log_prob, advantages, mask, "seq-mean-token-mean", actor
        ... )
        >>> loss.item(), metrics["actor/step_ratio_mean"]
        (1.0, 1.0)
    """
    return _policy_loss(
        "steppo",
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode,
        config,
        rollout_is_weights,
    )


@register_policy_loss("capo")
def capo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return `steppo` with the centered ratio (CAPO, the fifth version of arXiv 2604.18401).

    Its center is the mean of the log-ratios over this call, unless `policy_loss.ratio_center` sets
    it. Arguments, results and errors are those of `steppo`.

    Example:
        >>> import torch
        >>> from verl.workers.config import ActorConfig
        >>> actor = ActorConfig(
        ...     strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        ...     clip_ratio_low=3e-4, clip_ratio_high=4e-4, loss_agg_mode="seq-mean-token-mean",
        ... )
        >>> from steppo_kernels.integrations.verl import capo
        >>> log_prob, mask = torch.full((1, 4), 0.0001, requires_grad=True), torch.ones(1, 4)
        >>> loss, metrics = capo(torch.zeros(1, 4), log_prob, mask, mask, config=actor)
        >>> round(loss.item(), 4)
        -1.0001
    """
    return _policy_loss(
        "capo",
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode,
        config,
        rollout_is_weights,
    )


def _policy_loss(
    mode: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    actor: ActorConfig | None,
    rollout_is_weights: Tensor | None,
) -> tuple[Tensor, dict[str, float]]:
    if not isinstance(actor, ActorConfig):
        raise TypeError(f"config: got {type(actor).__name__}, expected verl's ActorConfig")
    settings = settings_of(actor, mode)
    mask = _action_tokens(response_mask, log_prob)
    batch = actor.global_batch_info
    aggregation = aggregation_of(loss_agg_mode, batch, mask, settings.rows_are_steps)
    config = loss_config(actor, settings, aggregation.reduction)
    cautions.of_bounds(config)
    cautions.of_precision({"log_prob": log_prob, "old_log_prob": old_log_prob})
    cautions.of_width(loss_agg_mode, batch, mask.shape[0])
    if config.ratio == "centered" and settings.ratio_center is None:
        cautions.of_center(batch, mask.shape[0])
    if rollout_is_weights is not None:
        rollout_is_weights = _of_tokens("rollout_is_weights", rollout_is_weights, mask)
    found = steppo_loss(
        log_prob,
        old_log_prob,
        _of_tokens("advantages", advantages, mask),
        layout_of(mask, rows_are_steps=settings.rows_are_steps),
        config=config,
        is_weights=rollout_is_weights,
        normalizer=aggregation.normalizer,
        ratio_center=settings.ratio_center,
    )
    return found.loss, _named(found.metrics)


def _action_tokens(response_mask: Tensor, log_prob: Tensor) -> Tensor:
    """Return the mask as bool ``[B, R]``."""
    mask = checks.flags("response_mask", response_mask, None, log_prob.device)
    if mask.dim() != 2 or mask.shape != log_prob.shape:
        raise ValueError(
            f"response_mask: got shape {tuple(mask.shape)}, expected that of log_prob, [B, R]: "
            f"{tuple(log_prob.shape)}"
        )
    return mask


def _of_tokens(name: str, values: Tensor, mask: Tensor) -> Tensor:
    if values.shape != mask.shape:
        raise ValueError(
            f"{name}: got shape {tuple(values.shape)}, expected that of response_mask: "
            f"{tuple(mask.shape)}"
        )
    return values


def _named(metrics: Metrics) -> dict[str, float]:
    numbers = metrics.as_dict()
    return {name: numbers[own] for name, own in _METRICS.items()}
