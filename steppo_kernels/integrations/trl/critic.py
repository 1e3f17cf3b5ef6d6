"""A value head on the body of the policy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# The module of the causal LM that holds the head: it is trained and saved with the model.
NAME = "steppo_value_head"


class ValueHead(nn.Linear):
    """Values of states from the hidden states of the body, in fp32.

    It begins with zeros: all values are 0 before the first update, and the first advantages are
    those of plain returns.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return the values ``[B, T]`` of states ``[B, T, d]``."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype)).squeeze(-1)


def add_value_head(model: Any) -> None:
    """Add a value head to a causal LM that has none."""
    if not hasattr(model, NAME):
        width = model.config.get_text_config().hidden_size
        model.add_module(NAME, ValueHead(width, model.get_input_embeddings().weight.device))


def keep_from_engine(generation: Any) -> None:
    """Leave the value head out of the weights that vLLM is sent, whose model has none.

    Args:
        generation: the `VLLMGeneration` of TRL.
    """
    every = generation._iter_named_params

    def of_policy() -> Iterator[tuple[str, Tensor]]:
        for name, one in every():
            if NAME not in name.split("."):
                yield name, one

    generation._iter_named_params = of_policy


def saved_with_adapter(peft_config: Any) -> Any:
    """Return a PEFT config that also trains and saves the value head."""
    config = copy.deepcopy(peft_config)
    config.modules_to_save = [*(config.modules_to_save or ()), NAME]
    return config


class Critic:
    """The values that forwards of a model compute beside what they return, while they are wanted.

    Args:
        model: a causal LM with a value head, not wrapped.
        trains_body: whether the gradient of the values goes on into the body.
    """

    def __init__(self, model: Any, trains_body: bool) -> None:
        self._head, self._trains_body = getattr(model, NAME), trains_body
        self._heard: list[Tensor] | None = None
        # Within the forward of the model, where what wraps it has gathered its parameters.
        model.base_model.register_forward_hook(self._after_body)

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Give a list that holds the values ``[B, T]`` of the latest forward within."""
        heard: list[Tensor] = []
        self._heard = heard
        try:
            yield heard
        finally:
            self._heard = None

    def _after_body(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self._heard is not None:
            states = output.last_hidden_state
            self._heard[:] = [self._head(states if self._trains_body else states.detach())]


def of_completions(values: Tensor, length: int) -> Tensor:
    """Return values ``[B, C]`` at tokens, each of the state before it.

    Args:
        values: ``[B, P + C]``, at position i of the state after token i.
        length: C.
    """
    return values[:, -length - 1 : -1]
