"""The forward of a patched model: what it takes, and when it goes another way."""

from __future__ import annotations

import copy
import inspect
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import head as heads
from .batches import LogProbBatch, StepPOBatch
from .call import FusedCall, with_values
from .placement import Tokens
from .probe import LogitMap


def patch_lm_head(model: nn.Module) -> LMHeadPatch:
    """Let a causal LM's own forward take `steppo` and return a loss or log-probs without logits.

    Called with ``steppo=StepPOBatch(...)`` or ``steppo=LogProbBatch(...)``, next to its other
    arguments, the model returns a `StepPOCausalLMOutput`; called without, what it returned before.
    In the former calls `use_cache` is False unless given, and `labels` are the tokens, as in
    training code that has them next to `inputs_embeds`: they may be anything (-100) where no action
    token is, and the model's own loss of them is not formed.

    The patch stays in place between calls, and a call concerns its own thread alone: other threads
    may generate from the model, or train it, meanwhile.

    A scale and a softcap that the model applies to its logits are part of the loss, and so is a cut
    of its vocabulary to the first token ids. They are measured in every call, over the whole
    vocabulary, from four rows that go through all that comes after the head: its hooks, subclasses,
    the model's own forward. Everything else that is done there raises. A forward hook on the model
    may look at the output, and may not change its logits: rows of other positions than the first
    two are not looked at there. The first call of a model that has a scale, a softcap or a cut
    evaluates its batch twice. Each call waits for the device: where the action tokens are, and what
    became of the four rows, is looked at on the host.

    The rows of the head may be split over ranks by tensor parallelism, as `ColwiseParallel` of
    torch and transformers' `tp_plan` do it: the ranks are called with the same batch, and each has
    the gradient of its rows. Beside what the functions of the head say to the other ranks, a call
    takes 1 collective after the model's forward, and 2 where it evaluates its batch twice; logits
    that stay split take 1 more, of four rows. An error of one rank at the head or behind it raises
    on all.

    Patch the model itself; wrap it before or after. What wraps it is handed no logits. A deep copy
    of a patched model is patched too, and `patch_of` finds its handle. A pickle of one
    (``torch.save(model)``) raises; its `state_dict` and `save_pretrained` are those of the model.
    Replicas of `torch.nn.DataParallel` raise in calls with `steppo`, as that does not split a
    batch.

    Args:
        model: a causal LM of transformers whose output head is an `nn.Linear`, tied or not; or a
            PEFT model of one, without adapters on its head.

    Returns:
        A handle; its `remove()`, or leaving it as a context, restores the model.

    Raises:
        TypeError, ValueError: the model is none that this works for; the text says why. Whether a
            head is split in a way that is supported shows in calls with `steppo`.
        RuntimeError: it is patched already; `patch_of` returns its handle.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from steppo_kernels import StepLayout
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2,
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> patch = patch_lm_head(model)
        >>> ids = torch.randint(50, (2, 8))
        >>> layout = StepLayout.from_mask(torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1]] * 2))
        >>> with torch.no_grad():
        ...     old = model(ids, steppo=LogProbBatch(layout)).log_probs
        >>> out = model(ids, steppo=StepPOBatch(old, torch.randn(layout.num_steps), layout))
        >>> out.loss.backward()
        >>> patch.remove()
    """
    return LMHeadPatch(_base(model))


def patch_of(model: nn.Module) -> LMHeadPatch | None:
    """Return the handle of a model that is patched, or None.

    Args:
        model: a model, or what wraps it: PEFT, DistributedDataParallel, FSDP, torch.compile.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2,
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> patch_of(model) is None
        True
        >>> patch = patch_of(model) or patch_lm_head(model)
        >>> patch_of(model) is patch
        True
    """
    for module in model.modules():
        found = module.__dict__.get("steppo_patch")
        if isinstance(found, LMHeadPatch):
            return found
    return None


class LMHeadPatch:
    """A patched model, to be restored; see `patch_lm_head`.

    Attributes:
        model: the causal LM whose forward takes `steppo`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2,
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> with patch_lm_head(model) as patch:
        ...     patch.model is model
        True
        >>> patch_of(model) is None
        True
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"model: got {type(model).__name__}, expected a PreTrainedModel of transformers or "
                "a PEFT model of one (what wraps it otherwise, such as DistributedDataParallel, "
                "stays outside: pass the model in it)"
            )
        if "steppo_patch" in model.__dict__:
            raise RuntimeError(
                "model: is patched already, expected one that is not; patch_of(model) returns its "
                "handle"
            )
        if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
            raise TypeError(f"model: got {type(model).__name__}, expected a causal LM")
        self.model = model
        self._head = heads.plain_head(model)
        self._inner = model.forward
        self._was_set = model.__dict__.get("forward")
        # What the last call measured.
        self._logit_map = LogitMap()
        signature = inspect.signature(model.forward)
        self._arguments = _positional(model, signature)
        self._names = frozenset(signature.parameters)
        self._takes_any = any(
            parameter.kind is inspect.Parameter.VAR_KEYWORD
            for parameter in signature.parameters.values()
        )
        heads.install(self._head)
        # Methods of the model, not closures over it: a deep copy of the model gets its own.
        self._set = model.forward = MethodType(_make_forward(signature), model)
        model.steppo_patch = self
        self._before = model.register_forward_pre_hook(_before_call, with_kwargs=True)
        self._after = model.register_forward_hook(_after_call, with_kwargs=True)

    def remove(self) -> None:
        """Restore the model's forward and that of its head; a second call does nothing.

        Raises:
            RuntimeError: something else replaced one of them after the patch.
        """
        model = self.model
        if model.__dict__.get("steppo_patch") is not self:
            return
        # Equal, not the same: what accelerate puts back when it unwraps is a method made anew.
        for what, is_ours in (
            ("forward", model.__dict__.get("forward") == self._set),
            ("forward of the output head", heads.is_installed(self._head)),
        ):
            if not is_ours:
                raise RuntimeError(
                    f"{what}: was replaced after patch_lm_head (by accelerate, perhaps), expected "
                    "the patch: undo what came after it first"
                )
        if self._was_set is None:
            del model.forward
        else:
            model.forward = self._was_set
        heads.uninstall(self._head)
        self._before.remove()
        self._after.remove()
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

    def call(self, given: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's forward; with `given`, its `steppo`, another way at its head."""
        asked = given if isinstance(given, _Asked) else _Asked(self.model, given)
        forward = self._forward_of(asked.model)
        if asked.batch is None:
            # A plain call from within a call with `steppo`, as a hook may make one.
            if heads.current() is not None:
                return heads.run_within(None, forward, args, kwargs)
            return forward(*args, **kwargs)
        return self._call_fused(asked, forward, args, kwargs)

    @torch.compiler.disable(recursive=False)
    def _call_fused(
        self, asked: _Asked, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        batch = asked.batch
        if not isinstance(batch, (StepPOBatch, LogProbBatch)):
            raise TypeError(
                f"steppo: got {type(batch).__name__}, expected a StepPOBatch or a LogProbBatch"
            )
        if asked.model is not self.model:
            raise RuntimeError(
                "model: got a call with steppo on a replica of the patched model, expected the "
                "model itself: DataParallel splits input_ids, and not the batch; use "
                "DistributedDataParallel"
            )
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        _refuse_arguments(given)
        tokens = self._tokens(batch, given)
        # With labels, the model would form a cross entropy of the probe.
        kwargs.pop("labels", None)
        by_position = self._arguments[: len(args)]
        if "labels" in by_position:
            at = by_position.index("labels")
            args = (*args[:at], None, *args[at + 1 :])
        if self._takes("return_dict") and "return_dict" not in by_position:
            kwargs["return_dict"] = True
        if self._takes("use_cache") and "use_cache" not in given:
            kwargs["use_cache"] = False
        call = FusedCall(
            batch, self._present_head(), tokens, given.get("attention_mask"), self._logit_map
        )
        output = call.run(self.model, forward, args, kwargs)
        self._logit_map = call.logit_map
        if not asked.has_hooks:
            return with_values(output, {"logits": None})
        asked.call = call
        return output

    def _takes(self, name: str) -> bool:
        """Return whether the model's forward takes an argument of that name."""
        return self._takes_any or name in self._names

    def _forward_of(self, model: nn.Module) -> Any:
        """Return the forward before the patch, of the patched model or of a replica of it."""
        if model is self.model or self._was_set is not None:
            return self._inner
        return MethodType(type(model).forward, model)

    def _present_head(self) -> nn.Linear:
        """Return the model's head, which may be another one than when it was patched."""
        head = heads.plain_head(self.model)
        if not heads.is_installed(head):
            heads.install(head)
        # Another thread may be here too, and have made the change.
        before, self._head = self._head, head
        if before is not head:
            heads.uninstall(before)
        return head

    def _tokens(self, batch: StepPOBatch | LogProbBatch, given: dict[str, Any]) -> Tokens:
        """Return the tokens of a call, and the argument that they were."""
        if batch.token_ids is not None:
            return Tokens("token_ids", batch.token_ids)
        main = self.model.main_input_name
        for name in ("labels", main):
            if given.get(name) is not None:
                return Tokens(name, given[name])
        raise ValueError(f"token_ids: got None without labels or {main}, expected the tokens")


class _Asked:
    """What a call of a patched model asks for, between the hooks of that model.

    Attributes:
        model: the one that is called: the patched one, or a replica of it.
        batch: its `steppo`.
        has_hooks: whether the model's hooks run: some wrappers call its forward alone.
        call: what ran, once it did.
    """

    def __init__(self, model: nn.Module, batch: object, has_hooks: bool = False) -> None:
        self.model, self.batch, self.has_hooks = model, batch, has_hooks
        self.call: FusedCall | None = None


# Hooks of the patched model. They get the module that is called, which a method of a replica does
# not: a replica shares the methods of the original.
def _before_call(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    patch, batch = module.steppo_patch, kwargs.get("steppo")
    if patch.model is not module:
        heads.adopt(module.get_output_embeddings())
    elif batch is None:
        return None
    else:
        # Hooks that were added meanwhile would come after the one that looks at their result.
        hooks, last = module._forward_hooks, patch._after.id
        if next(reversed(hooks)) != last:
            hooks.move_to_end(last)
    return args, {**kwargs, "steppo": _Asked(module, batch, has_hooks=True)}


def _after_call(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    asked = kwargs.get("steppo")
    if asked is None or asked.call is None:
        return None
    return asked.call.without_probe(output)


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


def _positional(model: nn.Module, signature: inspect.Signature) -> list[str]:
    """Return the names of arguments by position.

    A subclass whose forward takes ``*args`` hands them on to the class above.
    """
    of_classes = (
        [*inspect.signature(vars(kind)["forward"]).parameters.values()][1:]
        for kind in type(model).__mro__
        if "forward" in vars(kind)
    )
    for parameters in ([*signature.parameters.values()], *of_classes):
        found = [
            parameter.name
            for parameter in parameters
            if parameter.kind
            in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        ]
        if found or not any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
            return found
    return []


def _refuse_arguments(given: dict[str, Any]) -> None:
    """Raise for arguments of the model that mean nothing in a call without logits."""
    if given.get("return_dict") is False:
        raise ValueError("return_dict: got False with steppo, expected True or None")
    for name, kept in given.items():
        is_all = kept is None or (isinstance(kept, int) and kept == 0)
        if name.endswith("logits_to_keep") and not is_all:
            raise ValueError(
                f"{name}: got it with steppo, expected 0 or None: the layout says which are "
                "needed, and logits_to_keep of the batch that all is given for the last tokens"
            )


def _base(model: nn.Module) -> nn.Module:
    """Return the model in a PEFT model, or the model."""
    base = getattr(model, "get_base_model", None)
    found = base() if callable(base) else model
    assert isinstance(found, nn.Module) or not isinstance(model, nn.Module)
    return found
