"""What a patched model returns."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from ...outputs import StepPOOutput


@dataclass
class StepPOCausalLMOutput(ModelOutput):
    """What a patched model returns when it is called with `steppo`.

    An output is also an instance of the class that the model itself returns. It has that class's
    fields under their own names, such as hidden states, a cache or a router's loss, with what the
    model put there. None of it is part of `loss`.

    Attributes:
        loss: 0-dim, with a `StepPOBatch`. The one to differentiate.
        logits: None: there are none.
        steppo: loss, metrics and step log-ratios, with a `StepPOBatch`.
        log_probs: fp32 (fp64 of an fp64 model), of the shape of `input_ids` or of its last
            `logits_to_keep` columns, with a `LogProbBatch`: entry i is of token i, and 0 where that
            is no action. Differentiable.
        entropy: as `log_probs`, of the distributions that the tokens were drawn from, if asked for.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from steppo_kernels.integrations.transformers import LogProbBatch, patch_lm_head
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2,
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> patch = patch_lm_head(model)
        >>> request = LogProbBatch(torch.tensor([[0, 0, 1, 1]]))
        >>> ids = torch.randint(50, (1, 4))
        >>> out = model(ids, steppo=request, output_hidden_states=True)
        >>> isinstance(out, StepPOCausalLMOutput), list(out), out.logits is None
        (True, ['hidden_states', 'log_probs'], True)
    """

    loss: Tensor | None = None
    logits: None = None
    steppo: StepPOOutput | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None

    def __reduce__(self) -> Any:
        made, args, *rest = super().__reduce__()
        if made is StepPOCausalLMOutput:
            return made, args, *rest
        # A class that was made here has no name that pickle could find.
        return _remade, (type(self).__bases__[1], *args), *rest


def check_output(own: object) -> ModelOutput:
    """Return what a model's own forward returned, if its fields can be asked for."""
    if isinstance(own, ModelOutput) and is_dataclass(own):
        return own
    raise TypeError(
        f"model: its forward returned a {type(own).__name__}, expected a ModelOutput that is a "
        "dataclass"
    )


def output_like(own: ModelOutput, found: dict[str, Any]) -> StepPOCausalLMOutput:
    """Return the output of a model with `found` in it, and without its logits."""
    kept = {field.name: getattr(own, field.name) for field in fields(own)}
    return output_class(type(own))(**{**kept, "loss": None, "logits": None, **found})


def output_class(own: type[ModelOutput]) -> type[StepPOCausalLMOutput]:
    """Return the class of outputs that has the fields of the class `own` and ours."""
    if own not in _CLASSES:
        # Through the metaclass of transformers, where it has one.
        made: Any = type(ModelOutput)(
            f"StepPO{own.__name__}", (StepPOCausalLMOutput, own), {"__module__": __name__}
        )
        # Two threads may come here at once: they get the same.
        _CLASSES.setdefault(own, dataclass(made))
    return _CLASSES[own]


_CLASSES: dict[type[ModelOutput], type[StepPOCausalLMOutput]] = {}


def _remade(own: type[ModelOutput], *args: Any) -> StepPOCausalLMOutput:
    return output_class(own)(*args)
