"""Losses and log-probs of a causal LM of transformers, from its own forward, without its logits.

    patch_lm_head(model)
    with torch.no_grad():
        old = model(ids, attention_mask=mask, steppo=LogProbBatch(layout)).log_probs
    out = model(ids, attention_mask=mask, steppo=StepPOBatch(old, advantages, layout))
    out.loss.backward()

The call is the model's own, so that the hooks of what wraps it run: DDP, FSDP, PEFT, accelerate,
gradient checkpointing. Only the output head does something else in it, for this call and its thread
alone. It computes the loss from its hidden states (`steppo_kernels.linear_steppo_loss`) where its
weight is in place, and returns a few rows of known numbers in the place of logits. What the model
makes of them shows what it does to logits: that is part of the loss, or an error.

Positions are those of `input_ids`, and nothing is shifted by the caller: whatever is given or
returned per token has its entry for token i at place i. The model's state at place i - 1 is what
predicts token i; that this moves everything by one is dealt with here (`placement`). A batch with
`logits_to_keep` has it all for the last tokens of each row alone, as trainers do that hold prompts
and completions in one tensor of ids.
"""

from __future__ import annotations

from .batches import LogProbBatch, StepPOBatch
from .outputs import StepPOCausalLMOutput
from .patch import LMHeadPatch, patch_lm_head, patch_of

__all__ = [
    "LMHeadPatch",
    "LogProbBatch",
    "StepPOBatch",
    "StepPOCausalLMOutput",
    "patch_lm_head",
    "patch_of",
]
