"""The loss of one micro-batch of completions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layout.step_layout import StepLayout
from ...losses.policy_loss import steppo_loss
from ...losses.value_loss import step_value_loss
from ...outputs import StepPOOutput
from ..transformers import StepPOBatch
from . import critic
from .heads import action_mask

# Entries of TRL's micro-batches that this package adds.
RETURNS, OLD_VALUES = "step_returns", "step_old_values"


class Completions(NamedTuple):
    """Prompts and completions as a model reads them.

    Attributes:
        inputs: `input_ids` and `attention_mask`, ``[B, P + C]``.
        layout: the steps of the completions, ``[B, C]``.
        advantages: ``[B, C]``, the same at each token of a step.
        options: of the loss: what a token has beside its log-prob.
    """

    inputs: dict[str, Tensor]
    layout: StepLayout
    advantages: Tensor
    options: dict[str, Any]

    @staticmethod
    def of(batch: dict[str, Any]) -> Completions:
        """Return those of a micro-batch of TRL."""
        weights = batch.get("importance_sampling_ratio")
        shape = batch["completion_ids"].shape
        options = {
            "ref_log_probs": batch.get("ref_per_token_logps"),
            # One number for each completion in the modes of sequences, [B, 1].
            "is_weights": None if weights is None else weights.expand(shape),
        }
        return Completions(
            inputs=model_inputs(batch),
            layout=StepLayout.from_mask(action_mask(batch)),
            advantages=batch["advantages"],
            options=options,
        )


def model_inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Return the ids and the attention mask of prompts and completions, ``[B, P + C]``."""
    return {
        "input_ids": torch.cat((batch["prompt_ids"], batch["completion_ids"]), dim=1),
        "attention_mask": torch.cat((batch["prompt_mask"], batch["completion_mask"]), dim=1),
    }


def policy_loss(
    trainer: Any, model: Any, batch: dict[str, Any], normalizer: float | None
) -> tuple[StepPOOutput, StepLayout]:
    """Return the policy's loss with its metrics, and the steps.

    Args:
        trainer: the `StepPOTrainer`.
        model: the policy as accelerate wrapped it.
        batch: a micro-batch of TRL with `advantages` ``[B, C]``.
        normalizer: of the whole update; None is that of the micro-batch.
    """
    found = Completions.of(batch)
    old, config = batch.get("old_per_token_logps"), trainer.args.step_config
    # On-policy, every log-ratio is 0, and so is their mean over the whole update.
    center = 0.0 if config.ratio == "centered" and old is None else None
    options = {
        **found.options,
        "config": config,
        "normalizer": normalizer,
        "ratio_center": center,
    }
    if trainer.step_fused:
        request = StepPOBatch(
            old,
            found.advantages,
            found.layout,
            logits_to_keep=found.layout.shape[1],
            temperature=trainer.temperature,
            report_entropy=True,
            **options,
        )
        with trainer.accelerator.autocast():
            return model(**found.inputs, steppo=request).steppo, found.layout
    log_probs, entropy, _ = trainer._get_per_token_logps_and_entropies(
        model, **found.inputs, logits_to_keep=found.layout.shape[1], compute_entropy=True
    )
    output = steppo_loss(log_probs, old, found.advantages, found.layout, entropy=entropy, **options)
    return output, found.layout


def value_loss(
    trainer: Any,
    values: Tensor,
    batch: dict[str, Any],
    layout: StepLayout,
    normalizer: float | None,
) -> StepPOOutput:
    """Return the critic's loss with its metrics.

    Args:
        trainer: the `StepPOTrainer`.
        values: ``[B, P + C]``, of the states after each token.
        batch: as in `policy_loss`, with returns and old values ``[B, C]``.
        layout: the steps.
        normalizer: as in `policy_loss`.
    """
    args = trainer.args
    # The steps of a completion without a score have no return, and are not trained.
    layout = layout.keep(~batch[RETURNS].isnan())
    return step_value_loss(
        critic.of_completions(values, layout.shape[1]),
        batch[RETURNS],
        layout,
        old_values=batch[OLD_VALUES],
        clip=args.step_value_clip,
        reduction=args.step_config.reduction,
        normalizer=normalizer,
    )
