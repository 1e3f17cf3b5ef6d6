"""What is allowed and rarely meant. Each warning says what to do instead, or how to silence it.

A message begins with the name of a setting, by which a filter finds it, such as
``PYTHONWARNINGS="ignore:actor.clip_ratio_low"`` in the environment of the workers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...checks import HALF_DTYPES
from ...config import StepPOConfig

# Means over the tokens of a step rarely leave a range that is as wide as single tokens want it.
_WIDE_CLIP = 0.1


def of_bounds(config: StepPOConfig) -> None:
    """Warn of bounds for single tokens where the ratio is a mean over a step."""
    widest = max(config.clip_low, config.clip_high)
    if config.ratio == "geometric" and config.surrogate != "soft" and widest >= _WIDE_CLIP:
        _warn(
            f"actor.clip_ratio_low, actor.clip_ratio_high: got {config.clip_low} and "
            f"{config.clip_high} with the ratio 'geometric', which is a mean over the tokens of a "
            "step and hardly ever that far from 1: nothing is clipped. The authors of StepPO have "
            "3e-4 and 4e-4. Single tokens have policy_loss.ratio=token."
        )


def of_precision(log_probs: Mapping[str, Tensor]) -> None:
    """Warn of log-probs that are rounded by more than the bounds allow."""
    halves = [name for name, value in log_probs.items() if value.dtype in HALF_DTYPES]
    if halves:
        _warn(
            f"{', '.join(halves)}: got {log_probs[halves[0]].dtype}, whose rounding is larger than "
            "bounds such as 3e-4. verl returns log-probs in the dtype of the logits where "
            "flash-attn is missing: install flash-attn, or set "
            "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32."
        )


def of_width(mode: str, batch: Mapping[str, Any], num_rows: int) -> None:
    """Warn of a sum by row that is divided by the width of a part of the mini-batch."""
    total = batch.get("global_batch_size")
    if mode != "seq-mean-token-sum-norm" or batch.get("loss_scale_factor") is not None:
        return
    if total is not None and num_rows < total:
        _warn(
            "actor.loss_scale_factor: got none with loss_agg_mode=seq-mean-token-sum-norm, which "
            "divides by the longest response of each micro-batch then, so that the gradient "
            "depends on how the mini-batch is split. Set actor.loss_scale_factor to a number, such "
            "as data.max_response_length."
        )


def of_center(batch: Mapping[str, Any], num_rows: int) -> None:
    """Warn of a centered ratio whose center is that of a part of the mini-batch."""
    total = batch.get("global_batch_size")
    if total is not None and num_rows < total:
        _warn(
            "policy_loss.ratio_center: got none, so that the center of the ratio 'centered' is the "
            "mean of each micro-batch on each rank, and the gradient depends on how the mini-batch "
            "is split. Use one micro-batch a mini-batch on one rank, or fix the center: "
            "policy_loss.ratio_center=0 is exact in the first update after the rollout."
        )


def of_padding(share: float) -> None:
    """Warn of padding rows that count in the mean over rows."""
    _warn(
        f"ppo_mini_batch_size: got padding for {share:.0%} of the rows, which verl appends up to a "
        "multiple of the mini-batches and counts in the means over rows, those of seq-mean-* and "
        "of the critic, so that they weaken the update. Choose a smaller mini-batch. "
        "loss_agg_mode=token-mean does not count them, for the actor alone. The metric "
        "step/padding_fraction follows them."
    )


def of_whole_trajectories() -> None:
    """Warn of rows that hold whole trajectories where each is taken for a step."""
    _warn(
        "rows: got one for each trajectory, and several turns in some of them. steppo_sync takes a "
        "row for a step, so that no advantage is that of a turn. Let the agent loop return a list "
        "of outputs, one a turn; verl's own loop for tools returns one for all of them."
    )


def of_copied_rewards() -> None:
    """Warn of an outcome that stands in every row of its trajectory."""
    _warn(
        "trainer.v1.steppo_sync.rewards: got none, and the rows of each trajectory all have the "
        "same reward. verl's agent loop copies the score of the last row onto every row, which "
        "step_gae would count once a step. Set rewards=last to take that of the last row alone, "
        "rewards=extra_fields for rewards of steps, or rewards=rm_scores if they are as meant."
    )


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
