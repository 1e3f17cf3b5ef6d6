"""Options of GRPO that would be lost, as nothing but GRPO's own loss reads them."""

from __future__ import annotations

import warnings
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from torch import nn

_LOSS = "the loss is that of step_surrogate, step_ratio and step_reduction"
_ENTROPY = "the weight of the entropy is entropy_coef alone"
_VESPO = f"it belongs to the loss 'vespo'; {_LOSS}"

# Each with the reason that its error gives.
LOST: dict[str, str] = {
    "loss_type": _LOSS,
    "importance_sampling_level": "the ratio is that of step_ratio",
    "delta": "step_dual_clip bounds the loss of steps with a negative advantage",
    "top_entropy_quantile": "all action tokens are trained",
    "off_policy_mask_threshold": "no completion is masked for being off-policy",
    "use_bias_correction_kl": "the KL penalty is not multiplied by a ratio",
    "use_adaptive_entropy": _ENTROPY,
    "entropy_coef_min": _ENTROPY,
    "entropy_coef_max": _ENTROPY,
    "entropy_coef_delta": _ENTROPY,
    "entropy_target": _ENTROPY,
    "sapo_temperature_pos": "step_surrogate='soft' has step_soft_temperature",
    "sapo_temperature_neg": "step_surrogate='soft' has step_soft_temperature",
    "vespo_k_pos": _VESPO,
    "vespo_lambda_pos": _VESPO,
    "vespo_k_neg": _VESPO,
    "vespo_lambda_neg": _VESPO,
    "multi_objective_aggregation": "rewards are summed and then normalized",
}


class _Parts(NamedTuple):
    """How an update is cut into parts."""

    micro_batches: int
    ranks: int


def refuse_lost(args: Any) -> None:
    """Raise for an option that would be lost and does not have its default.

    Args:
        args: `StepPOTrainingArguments`.

    Raises:
        ValueError: naming the option.
    """
    for one in fields(args):
        value = getattr(args, one.name)
        if one.name in LOST and value != one.default:
            raise ValueError(
                f"{one.name}: got {value!r}, expected the default {one.default!r}: {LOST[one.name]}"
            )
        assert one.name not in LOST or one.default is not MISSING, one.name
    # None is the coefficient of the model; the trainer looks at that once there is one.
    if args.router_aux_loss_coef:
        raise ValueError(
            f"router_aux_loss_coef: got {args.router_aux_loss_coef!r}, expected 0.0 or None: the "
            "load-balancing loss is not part of this loss"
        )


def refuse_of_trainer(trainer: Any) -> None:
    """Raise for what only a trainer with its model shows.

    Args:
        trainer: a `GRPOTrainer` that is set up.

    Raises:
        ValueError: naming what it is.
    """
    args = trainer.args
    if trainer.aux_loss_enabled:
        raise ValueError(
            f"router_aux_loss_coef: got None with a model whose own is "
            f"{trainer.router_aux_loss_coef!r}, expected 0.0: the load-balancing loss is not part "
            "of this loss"
        )
    if trainer._is_vlm:
        raise ValueError(
            "processing_class: got that of a vision-language model, expected a tokenizer: images "
            "are not handed to this loss"
        )
    parts = _Parts(args.gradient_accumulation_steps, trainer.accelerator.num_processes)
    if args.step_config.ratio == "centered" and is_off_policy(args) and max(parts) > 1:
        raise ValueError(
            f"step_ratio: got 'centered' with gradient_accumulation_steps {parts.micro_batches} on "
            f"{parts.ranks} ranks and old log-probs, expected one part: its center is the mean "
            "over the whole update"
        )
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    period = args.steps_per_generation * args.num_iterations
    if is_sharded and period % args.gradient_accumulation_steps:
        raise ValueError(
            f"gradient_accumulation_steps: got {args.gradient_accumulation_steps} with "
            f"steps_per_generation * num_iterations = {period} and sharded gradients, expected a "
            "divisor of it: gradients are rescaled where an update reaches into another generation"
        )


def warn_of_dropout(model: nn.Module, args: Any) -> None:
    """Warn where dropout alone moves ratios: old log-probs have other masks than the new ones.

    Args:
        model: the policy.
        args: `StepPOTrainingArguments`.
    """
    if not is_off_policy(args):
        return
    # Dropout of attention weights is a number, and no module.
    rates = [
        one.p if isinstance(one, nn.Dropout) else getattr(one, "attention_dropout", 0.0)
        for one in model.modules()
    ]
    if (rate := max((one for one in rates if isinstance(one, float)), default=0.0)) > 0:
        warnings.warn(
            f"model: got dropout of {rate} with old log-probs, expected 0: the ratios of a policy "
            "that has not changed leave narrow bounds then; disable_dropout=True sets that of "
            "modules to 0",
            stacklevel=3,
        )


def is_off_policy(args: Any) -> bool:
    """Return whether TRL takes old log-probs: an update may follow another on one generation."""
    period = args.steps_per_generation * args.num_iterations
    return bool(
        args.gradient_accumulation_steps % period
        or (args.use_vllm and args.vllm_importance_sampling_correction)
    )
