"""One call of a patched model with `steppo`: what happens at its head, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...outputs import StepPOOutput
from ...ranks import Call
from .batches import LogProbBatch, StepPOBatch
from .head import present_part, run_within
from .outputs import StepPOCausalLMOutput, check_output, output_like
from .placement import States, Tokens
from .probe import WAY_OUT, LogitMap, check, measure, probe
from .tensor_parallel import Part, local
from .watch import Watch


class _CalledTwice(RuntimeError):
    """A model called its output head twice."""


class FusedCall:
    """A call in which a batch is evaluated in the place of the output head's product.

    The head returns a `probe` in the place of logits, and what the model makes of it is compared
    with what was assumed when the batch was evaluated. Where that differs, as in the first call of
    a model that scales its logits, the batch is evaluated once more.

    Ranks that share a head say one word to each other after the model's forward, and another one
    after a second evaluation, so that all of them go the same way, and so that none waits for one
    that failed after the head.
    """

    def __init__(
        self,
        batch: StepPOBatch | LogProbBatch,
        head: nn.Linear,
        tokens: Tokens,
        attention_mask: object,
        logit_map: LogitMap,
    ) -> None:
        self.batch, self.head = batch, head
        self.tokens, self.attention_mask = tokens, attention_mask
        self.logit_map = logit_map
        self._hidden: Tensor | None = None
        self._part: Part | None = None
        self._owes_word = False
        # What hooks of the model see of logits that no rank has all of.
        self._own: Tensor | None = None
        self._found: dict[str, Tensor] = {}
        self._steppo: StepPOOutput | None = None
        self._output: Tensor | None = None
        self._node: Any = None
        self._watch: Watch | None = None
        self._is_again = False
        self._width, self._device = 0, torch.device("cpu")

    def run(
        self, model: PreTrainedModel, forward: Any, args: Any, kwargs: Any
    ) -> StepPOCausalLMOutput:
        """Return the output of the model's forward, with the probe as its logits."""
        with self._heard_by_ranks():
            own = check_output(self._forward(forward, args, kwargs))
        if self._output is None:
            raise RuntimeError(
                f"model: {type(model).__name__} did not call its output head, expected one call "
                "with the hidden states of all positions"
            )
        logits: Any = getattr(own, "logits", None)
        measured = self._measure(logits)
        # What the hooks of the model see, and what must not keep the first evaluation.
        kept = output_like(own, {"logits": logits.detach()})
        del own
        if not measured.is_close(self.logit_map):
            del logits
            self.logit_map = measured
            logits = self._evaluate_again(model)
        tied = _AfterLogits.apply(local(logits), *self._found.values())
        found: dict[str, Any] = dict(zip(self._found, tied, strict=True))
        if self._steppo is not None:
            found["steppo"] = replace(self._steppo, loss=found["loss"])
        return with_values(kept, found)

    def without_probe(self, output: object) -> StepPOCausalLMOutput:
        """Return an output as the caller gets it, after hooks of the model that may change it.

        Raises:
            TypeError: hooks made something else of the output.
            ValueError: hooks changed the logits.
        """
        if not isinstance(output, StepPOCausalLMOutput):
            raise TypeError(
                f"model: a forward hook made a {type(output).__name__} of its output, expected a "
                "StepPOCausalLMOutput in a call with steppo"
            )
        logits: Any = output.logits
        if self._own is None:
            check(self.logit_map, local(logits), probe(self._width, self._device))
        elif self._own.numel():
            check(LogitMap(), local(logits), self._own)
        _check_graph(logits, None)
        return with_values(output, {"logits": None})

    def at_head(self, hidden: Tensor) -> Tensor:
        """Evaluate the batch on hidden states, and return the probe instead of logits."""
        if self._hidden is not None:
            if not self._is_again:
                raise _CalledTwice("model: called its output head again, expected one call")
            # The hooks before the forward ran once more, and may have changed them once more.
            if not torch.equal(local(hidden), local(self._hidden)):
                hidden = self._hidden
        part = present_part(self.head)
        states = part.plain(hidden)
        self._hidden, self._part = hidden, part
        self._width, self._device = part.vocabulary, states.device
        self._found, self._steppo = self.batch.evaluate(
            States(
                states,
                part.cut(self.logit_map.width),
                self.logit_map,
                self.tokens,
                self.attention_mask,
            )
        )
        self._owes_word = part.ranks is not None
        standing: Tensor = _HeadOutput.apply(
            probe(self._width, self._device), *self._found.values()
        )
        # Kept apart: what is done to the output in place makes another node of it.
        self._node = standing.grad_fn
        self._output = output = part.as_logits(standing)
        if not self._is_again:
            self._watch = Watch(output)
            self._watch.start()
        return output

    def _forward(self, forward: Any, args: Any, kwargs: Any) -> object:
        """Run the model's forward; what fails after the head may fail because of the probe."""
        try:
            return run_within(self, forward, args, kwargs)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            if self._output is None or isinstance(error, (_CalledTwice, torch.OutOfMemoryError)):
                raise
            raise ValueError(
                "model: what it does after its output head failed on the four rows that stand for "
                f"logits, expected a scale and a softcap. {WAY_OUT}. The error was: {error}"
            ) from error
        finally:
            if self._watch is not None:
                self._watch.stop()

    @contextmanager
    def _heard_by_ranks(self) -> Iterator[None]:
        """Let the ranks that share the head hear of an error, in the place of the word to come."""
        try:
            yield
        except BaseException as error:
            if self._owes_word:
                self._word().__exit__(type(error), error, None)
            raise

    def _word(self) -> Call:
        self._owes_word = False
        assert self._part is not None
        assert self._part.ranks is not None
        return Call("model", "model's tensor-parallel group", self._part.ranks)

    @torch.compiler.disable
    def _measure(self, logits: Any) -> LogitMap:
        """Return what the model did to its logits, and raise where that is more than a map.

        Ranks that share a head find the same, or all of them raise.
        """
        part = self._part
        assert part is not None
        if part.ranks is None:
            return self._measured(logits)
        measured = None
        with self._word() as word:
            if part.is_own(logits):
                self._check(logits)
                self._own = local(logits).detach().to(torch.float64, copy=True)
                facts = {"logits": f"those of its own ids, as a {type(logits).__name__}"}
            else:
                measured = self._measured(logits)
                facts = {name: repr(value) for name, value in measured._asdict().items()}
            word.agree(facts)
        if measured is None:
            measured = measure(part.gathered(logits), self._width, self._device)
        return measured

    def _measured(self, logits: Any) -> LogitMap:
        measured = measure(local(logits), self._width, self._device)
        self._check(logits)
        return measured

    def _check(self, logits: Any) -> None:
        """Raise where logits are made in another way than by operations that can be measured."""
        _check_graph(logits, self._node)
        self._check_operations(logits)

    def _check_operations(self, logits: Tensor) -> None:
        """Raise where logits of other positions may have been treated in another way."""
        reason = None if self._watch is None else self._watch.why_unknown(logits)
        if reason is not None:
            raise ValueError(
                f"model: changes its logits after the output head by {reason}, expected nothing "
                f"but products with single numbers, tanh and casts of all logits alike. {WAY_OUT}"
            )

    def _evaluate_again(self, model: PreTrainedModel) -> Tensor:
        """Return the output of a second call of the head: only within it are its weights whole."""
        self._is_again = True
        self._found, self._steppo, self._output, self._node = {}, None, None, None
        with self._heard_by_ranks():
            output: Tensor = run_within(self, model.get_output_embeddings(), (self._hidden,), {})
        if self._owes_word:
            # All of them know now what the model does, or none does.
            with self._word() as word:
                word.agree({})
        return output


def with_values(output: StepPOCausalLMOutput, found: dict[str, Any]) -> StepPOCausalLMOutput:
    """Return an output with some of its values replaced."""
    kept = {field.name: getattr(output, field.name) for field in fields(output)}
    return type(output)(**{**kept, **found})


# Sharded weights (FSDP, ZeRO) are gathered for backward, and their gradients reduced, from when the
# gradient of the head's output arrives. These two make it arrive, and before those of the loss and
# the log-probs are formed, as in a call with logits.
class _HeadOutput(torch.autograd.Function):
    """The probe, as something that is made of what was found at the head."""

    @staticmethod
    def forward(ctx: Any, standing: Tensor, *values: Tensor) -> Tensor:
        ctx.count = len(values)
        return standing.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, *(None for _ in range(ctx.count))


class _AfterLogits(torch.autograd.Function):
    """Values as they are, as something that is made of the logits too."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.like = logits.new_zeros(()).expand(logits.shape)
        ctx.set_materialize_grads(False)
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return ctx.like, *grads


def _check_graph(logits: Any, target: Any) -> None:
    """Raise where gradients of logits go elsewhere than to the node `target`, or not there.

    It is that of the head's output, or None where no gradients are to go anywhere. A scale that is
    learned would get none from the fused loss.
    """
    others = is_reached = False
    waiting, seen = [logits.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node is target:
            is_reached = True
            continue
        behind = [function for function, _ in node.next_functions]
        waiting += behind
        others |= not behind
    if others or (target is not None and not is_reached):
        what = "depend on something else that learns" if others else "are cut off from it"
        raise ValueError(
            f"model: its logits {what} after the output head, expected a scale and a softcap "
            "without parameters: a gradient would be left out. Use steppo_loss_from_logits on the "
            "logits that the model returns"
        )
