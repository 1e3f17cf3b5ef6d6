"""Losses and log-probs of a causal LM of transformers, from its own forward, without its logits.

    patch_lm_head(model)
    with torch.no_grad():
        old = model(ids, attention_mask=mask, steppo=LogProbBatch(layout)).log_probs
    out = model(ids, attention_mask=mask, steppo=StepPOBatch(old, advantages, layout))
    out.loss.backward()

The call is the model's own, so that the hooks of what wraps it run: DDP, FSDP, PEFT, accelerate,
gradient checkpointing. Only the output head does something else in it: it is given its hidden
states, computes the loss from them (`steppo_kernels.linear_steppo_loss`) where its weight is whole,
and returns a handful of numbers in the place of logits.

Positions are those of `input_ids`, and nothing is shifted by the caller: whatever is given or
returned per token has its entry for token i at place i. The model's state at place i - 1 is what
predicts token i; that this moves everything by one is dealt with here (`_Placed`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import MethodType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .. import checks
from ..backends import Backend
from ..config import StepPOConfig
from ..layout import StepLayout
from ..linear_steppo_loss import linear_steppo_loss
from ..linear_token_log_probs import linear_token_log_probs
from ..outputs import StepPOOutput
from ..policy_loss import DEFAULT_CONFIG

# Stand for logits: what the model makes of them shows what it would have made of the logits.
_PROBE = (-40.0, -2.0, -0.25, 0.5, 1.0, 25.0)
# Rounding of a model that returns logits in bf16.
_PROBE_TOLERANCE = 1e-2

# Attributes of a model's configuration by which its forward multiplies or divides logits.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAP = "final_logit_softcapping"


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


_OF_THE_MODEL = ("past_key_values", "hidden_states", "attentions", "aux_loss", "router_logits")


# What travels through a model's arguments is neither dataclass, tuple nor mapping: wrappers look
# into those, and FSDP's mixed precision would round the log-probs in them to bf16.
class StepPOBatch:
    """A batch whose `linear_steppo_loss` is wanted; its arguments, with everything at its token.

    Wrappers of the model neither cast nor move it: its tensors are on the device of the model.

    Args:
        old_log_probs: of the shape of `input_ids`; None if the policy that acted is the current.
        advantages: per step ``[S]``, or of the shape of `input_ids`.
        layout: which tokens of `input_ids` were sampled, in which steps; or a 0/1 mask. The first
            token of a row is never one, and none is padding: both raise.
        token_ids: the tokens, if the model is called with something else than `input_ids`.
        temperature: what the policy's logits are divided by; a number or one for each token.
        chunk_tokens: as in `linear_steppo_loss`.
        config: as in `steppo_loss`.
        ref_log_probs: as in `steppo_loss`.
        is_weights: as in `steppo_loss`.
        step_weights: as in `steppo_loss`.
        normalizer: as in `steppo_loss`. Data-parallel ranks, whose gradients are averaged, pass the
            global count divided by the number of ranks.
        ratio_center: as in `steppo_loss`.
        backend: implementation of what is not a matrix product.
    """

    def __init__(
        self,
        old_log_probs: Tensor | None,
        advantages: Tensor,
        layout: StepLayout | Tensor,
        *,
        token_ids: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        chunk_tokens: int | None = None,
        config: StepPOConfig = DEFAULT_CONFIG,
        ref_log_probs: Tensor | None = None,
        is_weights: Tensor | None = None,
        step_weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        ratio_center: float | Tensor | None = None,
        backend: Backend = "auto",
    ) -> None:
        self.old_log_probs = old_log_probs
        self.advantages = advantages
        self.layout = layout
        self.token_ids = token_ids
        self.temperature = temperature
        self.chunk_tokens = chunk_tokens
        self.config = config
        self.ref_log_probs = ref_log_probs
        self.is_weights = is_weights
        self.step_weights = step_weights
        self.normalizer = normalizer
        self.ratio_center = ratio_center
        self.backend: Backend = backend

    def evaluate(self, states: _States) -> tuple[dict[str, Tensor], StepPOOutput | None]:
        """Return the output's tensors that come from the states before the head, and metrics."""
        placed = _Placed(self.layout, states, self.backend)
        found = linear_steppo_loss(
            states.hidden,
            states.weight,
            placed.tokens(states.token_ids),
            placed.tokens(self.old_log_probs),
            placed.tokens(self.advantages),
            placed.layout,
            bias=states.bias,
            temperature=states.scaling.temperature(placed.tokens(self.temperature)),
            softcap=states.scaling.softcap,
            chunk_tokens=self.chunk_tokens,
            config=self.config,
            ref_log_probs=placed.tokens(self.ref_log_probs),
            is_weights=placed.tokens(self.is_weights),
            step_weights=self.step_weights,
            normalizer=self.normalizer,
            ratio_center=self.ratio_center,
            backend=self.backend,
        )
        return {"loss": found.loss}, found


class LogProbBatch:
    """A batch whose token log-probs are wanted, as of the old and of the reference policy.

    Under ``torch.no_grad()`` nothing is kept; else the log-probs are differentiable, at the cost of
    forming logits, a chunk at a time, once more (`linear_token_log_probs`).

    Args:
        layout: as in `StepPOBatch`; other tokens cost nothing and get 0.
        token_ids: as in `StepPOBatch`.
        temperature: as in `StepPOBatch`.
        return_entropy: also return the entropies.
        chunk_tokens: as in `linear_token_log_probs`.
        backend: as in `StepPOBatch`.
    """

    def __init__(
        self,
        layout: StepLayout | Tensor,
        *,
        token_ids: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        return_entropy: bool = False,
        chunk_tokens: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        self.layout = layout
        self.token_ids = token_ids
        self.temperature = temperature
        self.return_entropy = return_entropy
        self.chunk_tokens = chunk_tokens
        self.backend: Backend = backend

    def evaluate(self, states: _States) -> tuple[dict[str, Tensor], StepPOOutput | None]:
        """Return the output's tensors that come from the states before the head, and metrics."""
        placed = _Placed(self.layout, states, self.backend)
        found = linear_token_log_probs(
            states.hidden,
            states.weight,
            placed.tokens(states.token_ids),
            bias=states.bias,
            temperature=states.scaling.temperature(placed.tokens(self.temperature)),
            softcap=states.scaling.softcap,
            mask=placed.layout.step_ids >= 0,
            return_entropy=self.return_entropy,
            chunk_tokens=self.chunk_tokens,
            backend=self.backend,
        )
        values = found if isinstance(found, tuple) else (found,)
        # Back from the place of the state to that of the token.
        at_tokens = (value.reshape(-1).roll(1).view(value.shape) for value in values)
        return dict(zip(("log_probs", "entropy"), at_tokens, strict=False)), None


def patch_lm_head(model: nn.Module) -> LMHeadPatch:
    """Let a causal LM's own forward take `steppo` and return a loss or log-probs without logits.

    Called with ``steppo=StepPOBatch(...)`` or ``steppo=LogProbBatch(...)``, next to its other
    arguments, the model returns a `StepPOCausalLMOutput`; called without, what it returned before.
    In the former calls `use_cache` is False unless given.

    A logit softcap and a logit scale of the model's configuration are part of the loss; what the
    model does after its head is compared with them in the first call, which waits for the device
    once.

    Patch the model itself; wrap it before or after. A deep copy of a patched model is patched too;
    its own handle is ``copy.steppo_patch``.

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
        self._proven: _Scaling | None = None
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
        if model.__dict__.get("forward") is not self._set:
            raise RuntimeError(
                "forward: was replaced after patch_lm_head (by accelerate, perhaps), expected the "
                "patch: undo what came after it first"
            )
        if self._was_set is None:
            del model.forward
        else:
            model.forward = self._was_set
        del model.steppo_patch

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
        given = dict(zip(inspect.signature(self._inner).parameters, args, strict=False)) | kwargs
        _refuse_arguments(given)
        token_ids = given.get("input_ids") if batch.token_ids is None else batch.token_ids
        if token_ids is None:
            raise ValueError("token_ids: got None without input_ids, expected the batch's tokens")
        head = _check_linear(self.model)
        work = _AtHead(batch, head, token_ids, given.get("attention_mask"), _scaling(self.model))
        kwargs["return_dict"] = True
        if "use_cache" not in given:
            kwargs["use_cache"] = False
        with _forward_replaced(head, work):
            outputs = self._inner(*args, **kwargs)
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
        return StepPOCausalLMOutput(**found, **{name: outputs.get(name) for name in _OF_THE_MODEL})


class _Scaling(NamedTuple):
    """What a model does to its logits: caps them, if it does, and multiplies them."""

    softcap: float | None
    scale: float

    def temperature(self, temperature: Any) -> Any:
        """Return the temperature that has the effect of `temperature` and the scale together."""
        return temperature if self.scale == 1.0 else temperature / self.scale

    def compare(self, made: object) -> None:
        """Raise unless `made` is what this makes of the probe."""
        expected = torch.tensor(_PROBE)
        if self.softcap is not None:
            expected = self.softcap * torch.tanh(expected / self.softcap)
        expected = self.scale * expected
        values = made.detach().float().cpu() if isinstance(made, Tensor) else torch.empty(0)
        if values.shape != (1, 1, len(_PROBE)) or not torch.allclose(
            values[0, 0], expected, rtol=_PROBE_TOLERANCE, atol=0.0
        ):
            raise ValueError(
                "model: changes its logits after the output head in a way that is not known here; "
                f"supported are the settings {_SOFTCAP}, {', '.join(_MULTIPLIERS)} and "
                f"{', '.join(_DIVISORS)} of its configuration, here softcap {self.softcap} and "
                f"scale {self.scale:g}. It made {values.flatten().tolist()} of {list(_PROBE)}, "
                f"expected {expected.tolist()}"
            )


class _States(NamedTuple):
    """What there is at the head: its input, itself, and what the call says about the tokens."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scaling: _Scaling
    token_ids: Tensor
    attention_mask: Tensor | None


class _AtHead:
    """Stands in for the head's forward in one call, and keeps what was found there."""

    def __init__(
        self,
        batch: StepPOBatch | LogProbBatch,
        head: nn.Linear,
        token_ids: Tensor,
        attention_mask: Tensor | None,
        scaling: _Scaling,
    ) -> None:
        self.batch, self.head = batch, head
        self.token_ids, self.attention_mask = token_ids, attention_mask
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
            _States(hidden, weight, bias, self.scaling, self.token_ids, self.attention_mask)
        )
        probe = torch.tensor([[_PROBE]], device=hidden.device)
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


class _Placed:
    """A batch with everything of token i at the place of the state that predicts it, i - 1.

    The states themselves stay where they are, as the largest of the tensors; and rows follow each
    other, so that the first place of a row, which is no action's, takes the last place of the row
    before.
    """

    def __init__(self, layout: StepLayout | Tensor, states: _States, backend: Backend) -> None:
        """Check which tokens are actions, and move them."""
        tokens = checks.integer("token_ids", states.token_ids)
        if isinstance(layout, Tensor):
            layout = StepLayout.from_mask(layout, backend=backend)
        elif not isinstance(layout, StepLayout):
            raise TypeError(f"layout: got {type(layout).__name__}, expected a StepLayout or a mask")
        if layout.shape.numel() != tokens.numel():
            raise ValueError(
                f"layout: got shape {tuple(layout.shape)}, expected that of the tokens, "
                f"{tuple(tokens.shape)}"
            )
        self._num_tokens = tokens.numel()
        index = checks.on_device("layout", layout.token_index, states.hidden.device)
        allowed = _predicted(layout, tokens.shape, states.attention_mask)
        bad = index[~allowed[index]]
        if len(bad):
            where = divmod(int(bad.min()), tokens.shape[-1])
            raise ValueError(
                f"layout: got an action token in row {where[0]}, column {where[1]}, expected it "
                "and the token before it to be in the row and in attention_mask"
            )
        self.layout = replace(
            layout,
            step_ids=layout.step_ids.reshape(-1).roll(-1).view(layout.shape),
            token_index=index - 1,
        )

    def tokens(self, values: Any) -> Any:
        """Return what is given per token at the places of the states; all else as it is.

        What is given per step is never as long: where a row begins there is no action.
        """
        if not isinstance(values, Tensor) or values.numel() != self._num_tokens:
            return values
        return values.reshape(-1).roll(-1).view(values.shape)


def _predicted(layout: StepLayout, shape: torch.Size, attention_mask: object) -> Tensor:
    """Return which tokens ``[N]`` a state predicts: none at the start of a row or at padding."""
    num_tokens, device = shape.numel(), layout.device
    found = torch.ones(num_tokens, dtype=torch.bool, device=device)
    found[layout.row_offsets[:-1][layout.row_offsets.diff() > 0]] = False
    found.view(-1, max(shape[-1], 1))[:, 0] = False
    if isinstance(attention_mask, Tensor) and attention_mask.shape == shape:
        seen = attention_mask.reshape(-1) != 0
        found &= seen & seen.roll(1)
    return found


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


def _refuse_arguments(given: dict[str, Any]) -> None:
    """Raise for arguments of the model that mean nothing in a call without logits."""
    if given.get("labels") is not None:
        raise ValueError(
            "labels: got them with steppo, expected None: steppo says what the loss is"
        )
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
        return head
    kind = f"{type(head).__module__}.{type(head).__name__}"
    message = f"model: its output head is a {kind}, expected a plain nn.Linear"
    if kind.startswith("peft."):
        message += (
            "; adapters on the head would be left out: keep it out of target_modules and "
            "modules_to_save, or merge them first"
        )
    raise TypeError(message)


def _scaling(model: PreTrainedModel) -> _Scaling:
    """Return what the model's configuration says that happens to logits."""
    config = model.config.get_text_config()
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= getattr(config, name, None) or 1.0
    for name in _DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    return _Scaling(getattr(config, _SOFTCAP, None), scale)


@contextlib.contextmanager
def _forward_replaced(head: nn.Module, work: _AtHead) -> Iterator[None]:
    """Let `head` run `work` in the place of its forward, inside of its hooks.

    accelerate moves weights around the forward that it finds, and keeps that under another name.
    """
    name = "_old_forward" if "_old_forward" in head.__dict__ else "forward"
    before = head.__dict__.get(name)
    setattr(head, name, work)
    try:
        yield
    finally:
        if before is None:
            delattr(head, name)
        else:
            setattr(head, name, before)
