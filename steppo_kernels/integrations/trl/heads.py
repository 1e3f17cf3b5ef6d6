"""Where log-probs come from: the patched model, or TRL's own fused head."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from ..transformers import LogProbBatch, patch_lm_head, patch_of

logger = logging.getLogger(__name__)


def choose_fused(model: nn.Module, args: Any) -> bool:
    """Patch the model if that is wanted and possible, and return whether it is patched.

    Args:
        model: the policy, after TRL has put its own fused head into it. The other order would hide
            `steppo` from the signature of its forward.
        args: `StepPOTrainingArguments`.

    Raises:
        TypeError, ValueError: `step_fused` is True, and the head cannot be patched.
    """
    if args.step_fused is False:
        return False
    try:
        patch(model)
    except (TypeError, ValueError) as why:
        if args.step_fused:
            raise
        logger.warning("step_fused: the loss takes TRL's log-probs, as there is no patch. %s", why)
        return False
    return True


def patch(model: nn.Module) -> None:
    """Patch a model that is not patched yet."""
    if patch_of(model) is None:
        patch_lm_head(model)


def fused_log_probs(
    trainer: Any, model: nn.Module, inputs: dict[str, Tensor], mask: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Return log-probs of action tokens ``[B, C]``, and their entropies if they are wanted.

    Args:
        trainer: the trainer, for its autocast and temperature.
        model: the patched policy or reference, wrapped or not.
        inputs: `input_ids` and `attention_mask` ``[B, P + C]``.
        mask: the action tokens, ``[B, C]``; others cost nothing and get 0.
        entropy: whether entropies are wanted.
    """
    batch = LogProbBatch(
        mask,
        logits_to_keep=mask.shape[1],
        temperature=trainer.temperature,
        return_entropy=entropy,
    )
    with trainer.accelerator.autocast():
        output = model(**inputs, steppo=batch)
    return output.log_probs, output.entropy if entropy else None


def run_body(trainer: Any, model: nn.Module, inputs: dict[str, Tensor], length: int) -> None:
    """Run a model for what its body does, in the same call as ever: what wraps it sees that.

    Args:
        trainer: the trainer.
        model: the policy, wrapped or not.
        inputs: `input_ids` and `attention_mask` ``[B, P + C]``.
        length: C.
    """
    if trainer.step_fused:
        # One token of each row costs little at the head.
        mask = inputs["attention_mask"][:, -length:].clone()
        mask[:, 1:] = 0
        fused_log_probs(trainer, model, inputs, mask, entropy=False)
    else:
        trainer._get_per_token_logps_and_entropies(model, **inputs, logits_to_keep=1)


def action_mask(inputs: dict[str, Any]) -> Tensor:
    """Return which tokens of the completions the policy wrote: int64 ``[B, C]`` of 0 and 1.

    TRL pads the mask of tools with 1.
    """
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def padded_mask(rows: list[list[int]] | None, like: Tensor) -> Tensor:
    """Return a list of masks as a tensor of the shape of `like`, padded with 1 on the right."""
    found = torch.ones_like(like)
    for row, entries in enumerate(rows or ()):
        found[row, : len(entries)] = torch.tensor(entries, dtype=like.dtype, device=like.device)
    return found
