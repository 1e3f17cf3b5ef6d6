"""The forward of a patched model, and its output head inside of it."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from dataclasses import replace
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...outputs import StepPOOutput
from .batches import LogProbBatch, StepPOBatch
from .outputs import check_output, output_like
from .placement import States, Tokens
from .scaling import PROBE, Scaling, scaling_of


def patch_lm_head(model: nn.Module) -> LMHeadPatch:
    """Let a causal LM's own forward take `steppo` and return a loss or log-probs without logits.

    Called with ``steppo=StepPOBatch(...)`` or ``steppo=LogProbBatch(...)``, next to its other
    arguments, the model returns a `StepPOCausalLMOutput`; called without, what it returned before.
    In the former calls `use_cache` is False unless given, and `labels` are the tokens, as in
    training code that has them next to `inputs_embeds`: they may be anything (-100) where no action
    token is, and the model's own loss of them is not formed.

    A logit softcap and a logit scale of the model's configuration are part of the loss; what the
    model does after its head is compared with them in the first call. Each call waits for the
    device: where the action tokens are is looked at on the host.

    Patch the model itself; wrap it before or after. A deep copy of a patched model is patched too;
    its own handle is ``copy.steppo_patch``. A pickle of one (``torch.save(model)``) raises.

    Args:
        model: a causal LM of transformers whose output head is an `nn.Linear`, tied or not; or a
            PEFT model of one, without adapters on its head.

    Returns:
        A handle; its `remove()`, or leaving it as a context, restores the model.

    Raises:
        TypeError, ValueError: the model is none that this works for; the text says why.
        RuntimeError: it is patched already.
    """
    base = getattr(model, "get_base_model", None)
    return LMHeadPatch(base() if callable(base) else model)


class LMHeadPatch:
    """A patched model, to be restored; see `patch_lm_head`.

    Attributes:
        model: the causal LM whose forward takes `steppo`.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"model: got {type(model).__name__}, expected a PreTrainedModel of transformers or "
                "a PEFT model of one (what wraps it otherwise, such as DistributedDataParallel, "
                "stays outside: pass the model in it)"
            )
        if "steppo_patch" in model.__dict__:
            raise RuntimeError("model: is patched already; call remove() of that handle first")
        if model.config.is_encoder_decoder or not model.can_generate():
            raise TypeError(f"model: got {type(model).__name__}, expected a causal LM")
        _check_linear(model)
        self.model = model
        self._inner = model.forward
        self._was_set = model.__dict__.get("forward")
        self._proven: Scaling | None = None
        made = _make_forward(inspect.signature(model.forward))
        # Methods of the model, not closures over it: a deep copy of the model gets its own.
        self._set = model.forward = MethodType(made, model)
        model.steppo_patch = self

    def remove(self) -> None:
        """Restore the model's forward; a second call does nothing.

        Raises:
            RuntimeError: something else replaced the forward after the patch.
        """
        model = self.model
        if model.__dict__.get("steppo_patch") is not self:
            return
        # Equal, not the same: what accelerate puts back when it unwraps is a method made anew.
        if model.__dict__.get("forward") != self._set:
            raise RuntimeError(
                "forward: was replaced after patch_lm_head (by accelerate, perhaps), expected the "
                "patch: undo what came after it first"
            )
        if self._was_set is None:
            del model.forward
        else:
            model.forward = self._was_set
        del model.steppo_patch

    def __deepcopy__(self, memo: dict[int, Any]) -> LMHeadPatch:
        """Return the handle of a copy of the model."""
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce__(self) -> Any:
        """Refuse: pickle would take the class's forward for that of the model."""
        raise TypeError(
            "model: a patched model cannot be pickled; call remove() of its patch_lm_head before, "
            "or save its state_dict"
        )

    def __enter__(self) -> LMHeadPatch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def call(self, batch: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's forward, with `batch` evaluated in the place of its head."""
        if batch is None:
            return self._inner(*args, **kwargs)
        if not isinstance(batch, (StepPOBatch, LogProbBatch)):
            raise TypeError(
                f"steppo: got {type(batch).__name__}, expected a StepPOBatch or a LogProbBatch"
            )
        names = [*inspect.signature(self._inner).parameters][: len(args)]
        given = dict(zip(names, args, strict=False)) | kwargs
        _refuse_arguments(given)
        tokens = _tokens(batch, given)
        # With labels, the model would form a cross entropy of the probe.
        kwargs.pop("labels", None)
        if "labels" in names:
            at = names.index("labels")
            args = (*args[:at], None, *args[at + 1 :])
        head = _check_linear(self.model)
        work = _AtHead(batch, head, tokens, given.get("attention_mask"), scaling_of(self.model))
        kwargs["return_dict"] = True
        if "use_cache" not in given:
            kwargs["use_cache"] = False
        with _forward_replaced(head, work):
            outputs = check_output(self._inner(*args, **kwargs))
        if work.found is None:
            raise RuntimeError(
                f"model: {type(self.model).__name__} did not call its output head, expected one "
                "call with the hidden states of all positions"
            )
        if work.scaling != self._proven:
            work.scaling.compare(outputs.logits)
            self._proven = work.scaling
        tied = _AfterLogits.apply(outputs.logits, *work.found.values())
        found = dict(zip(work.found, tied, strict=True))
        if work.steppo is not None:
            found["steppo"] = replace(work.steppo, loss=found["loss"])
        return output_like(outputs, found)


class _AtHead:
    """Stands in for the head's forward in one call, and keeps what was found there."""

    def __init__(
        self,
        batch: StepPOBatch | LogProbBatch,
        head: nn.Linear,
        tokens: Tokens,
        attention_mask: Tensor | None,
        scaling: Scaling,
    ) -> None:
        self.batch, self.head = batch, head
        self.tokens, self.attention_mask = tokens, attention_mask
        self.scaling = scaling
        self.found: dict[str, Tensor] | None = None
        self.steppo: StepPOOutput | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Evaluate the batch on hidden states, and return the probe instead of logits."""
        if self.found is not None:
            raise RuntimeError("model: called its output head again, expected one call")
        # Read now: only around the head's forward does FSDP or ZeRO-3 have it whole.
        weight, bias = self.head.weight, self.head.bias
        if hasattr(weight, "full_tensor"):
            raise TypeError(
                "model: the weight of its output head is a DTensor in its forward, expected a "
                "whole one: tensor parallelism of the head is not supported"
            )
        self.found, self.steppo = self.batch.evaluate(
            States(hidden, weight, bias, self.scaling, self.tokens, self.attention_mask)
        )
        probe = torch.tensor([[PROBE]], dtype=torch.float32, device=hidden.device)
        output: Tensor = _HeadOutput.apply(probe, *self.found.values())
        return output


# Sharded weights (FSDP, ZeRO) are gathered for backward, and their gradients reduced, from when the
# gradient of the head's output arrives. These two make it arrive, and before those of the loss and
# the log-probs are formed, as in a call with logits.
class _HeadOutput(torch.autograd.Function):
    """The probe, as something that is made of what was found at the head."""

    @staticmethod
    def forward(ctx: Any, probe: Tensor, *values: Tensor) -> Tensor:
        ctx.count = len(values)
        return probe.clone()

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


def _make_forward(signature: inspect.Signature) -> Any:
    """Return a forward of that signature and `steppo`, which others read to know its arguments."""

    def forward(self: Any, *args: Any, steppo: Any = None, **kwargs: Any) -> Any:
        return self.steppo_patch.call(steppo, args, kwargs)

    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    own = [*signature.parameters.values()]
    rest = [own.pop()] if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    extra = inspect.Parameter("steppo", inspect.Parameter.KEYWORD_ONLY, default=None)
    shown = [inspect.Parameter("self", positional), *own, extra, *rest]
    forward.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return forward


def _tokens(batch: StepPOBatch | LogProbBatch, given: dict[str, Any]) -> Tokens:
    """Return the tokens of a call, and the argument that they were."""
    if batch.token_ids is not None:
        return Tokens("token_ids", batch.token_ids)
    for name in ("labels", "input_ids"):
        if given.get(name) is not None:
            return Tokens(name, given[name])
    raise ValueError("token_ids: got None without labels or input_ids, expected the batch's tokens")


def _refuse_arguments(given: dict[str, Any]) -> None:
    """Raise for arguments of the model that mean nothing in a call without logits."""
    if given.get("return_dict") is False:
        raise ValueError("return_dict: got False with steppo, expected True or None")
    for name in ("logits_to_keep", "num_logits_to_keep"):
        kept = given.get(name)
        if kept is not None and not (isinstance(kept, int) and kept == 0):
            raise ValueError(
                f"{name}: got it with steppo, expected 0 or None: the layout says which are needed"
            )


def _check_linear(model: PreTrainedModel) -> nn.Linear:
    """Return the model's output head, if it is a matrix and nothing else."""
    head = model.get_output_embeddings()
    head = getattr(head, "_fsdp_wrapped_module", head)
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
        own = head.__dict__.get(_forward_name(head))
        if own is None or own == MethodType(nn.Linear.forward, head):
            return head
        raise TypeError(
            "model: the forward of its output head was replaced, expected that of nn.Linear (what "
            "the replacement does would be left out)"
        )
    kind = f"{type(head).__module__}.{type(head).__name__}"
    message = (
        f"model: its output head is a {kind}, expected a plain nn.Linear; linear_steppo_loss takes "
        "hidden states and any weight, such as base + B @ A"
    )
    if kind.startswith("peft."):
        message += (
            "; adapters on the head would be left out: keep it out of target_modules and "
            "modules_to_save, or merge them first"
        )
    raise TypeError(message)


def _forward_name(head: nn.Module) -> str:
    """Return where the forward of `head` is: accelerate moves weights around one it keeps aside."""
    return "_old_forward" if "_old_forward" in head.__dict__ else "forward"


@contextlib.contextmanager
def _forward_replaced(head: nn.Module, work: _AtHead) -> Iterator[None]:
    """Let `head` run `work` in the place of its forward, inside of its hooks."""
    name = _forward_name(head)
    before = head.__dict__.get(name)
    setattr(head, name, work)
    try:
        yield
    finally:
        if before is None:
            delattr(head, name)
        else:
            setattr(head, name, before)
