"""What a patched model returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from ...outputs import StepPOOutput


@dataclass
class StepPOCausalLMOutput(ModelOutput):
    """What a patched model returns when it is called with `steppo`.

    Attributes:
        loss: 0-dim, with a `StepPOBatch`. The one to differentiate.
        logits: None: there are none.
        steppo: loss, metrics and step log-ratios, with a `StepPOBatch`.
        log_probs: fp32 (fp64 of an fp64 model), of the shape of `input_ids`, with a `LogProbBatch`:
            entry i is of token i, and 0 where that is no action. Differentiable.
        entropy: as `log_probs`, of the distributions that the tokens were drawn from, if asked for.
        past_key_values, hidden_states, attentions, aux_loss, router_logits: of the model, where it
            returns them. `aux_loss` is not part of `loss`.
    """

    loss: Tensor | None = None
    logits: None = None
    steppo: StepPOOutput | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    past_key_values: Any | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
