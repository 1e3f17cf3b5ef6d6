"""The public functions, each with ordinary arguments in which one at a time is replaced."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

import steppo_kernels as package
from fuzz.ways import Case, of_anything, of_layout, of_number, of_sequence, of_tensor
from steppo_kernels import StepLayout, StepPOConfig, TokenSupport

MASK = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 1, 0, 0]], dtype=torch.bool)
IDS = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 7, 3, 1, 2]]) % 5
TOKENS = torch.linspace(-1.0, -0.1, 12).reshape(2, 6)
STEPS = torch.linspace(-1.0, 1.0, 4)
STEP_IDS = torch.tensor([[-1, 0, 0, -1, 3, 3], [0, 0, 1, -1, 1, 2]])
# Each step ends with a 4.
ENDED = torch.tensor([[0, 1, 4, 0, 4, 0], [1, 4, 0, 4, 0, 0]])
CUTS = torch.tensor([0, 5, 5, 12])


def layout() -> StepLayout:
    return StepLayout.from_mask(MASK, backend="reference")


class Subject(NamedTuple):
    """A public callable and ordinary arguments of it.

    Attributes:
        name: its own, and what its arguments are where there are several kinds.
        function: the callable.
        arguments: by name.
        leaves: arguments that gradients flow to.
    """

    name: str
    function: Callable[..., object]
    arguments: dict[str, object]
    leaves: tuple[str, ...] = ()

    def on(self, device: str) -> Subject:
        """Return the subject with its arguments on a device."""
        movable = (torch.Tensor, StepLayout, TokenSupport)
        return self._replace(
            arguments={
                name: value.to(device) if isinstance(value, movable) else value
                for name, value in self.arguments.items()
            }
        )

    @property
    def parameters(self) -> list[str]:
        """Return the names that its signature has, those with a default included."""
        listed = inspect.signature(self.function).parameters.values()
        return [one.name for one in listed if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]

    def ordinary(self, parameter: str) -> object:
        """Return the ordinary value of a parameter, by default its default."""
        if parameter in self.arguments:
            return self.arguments[parameter]
        default = inspect.signature(self.function).parameters[parameter].default
        return None if default is inspect.Parameter.empty else default


# Ordinary values of parameters that several functions share.
_LOSS = {
    "old_log_probs": TOKENS.flip(0).contiguous(),
    "advantages": STEPS,
    "config": StepPOConfig(clip_low=0.2, clip_high=0.3, kl_coef=0.1, entropy_coef=0.1),
    "ref_log_probs": TOKENS.flip(1).contiguous(),
    "is_weights": TOKENS.abs(),
    "step_weights": STEPS.abs(),
    "normalizer": 3.0,
    "clip_low": STEPS.abs() / 2,
    "clip_high": STEPS.abs().flip(0).contiguous(),
}
_HEAD = {
    "hidden": torch.linspace(-1.0, 1.0, 36).reshape(2, 6, 3),
    "weight": torch.linspace(-1.0, 1.0, 15).reshape(5, 3),
    "token_ids": IDS,
    "bias": torch.linspace(-0.3, 0.2, 5),
    "temperature": 1.5,
    "softcap": 2.0,
    "chunk_tokens": 2,
}
# What sets and several ids go with is tried with them too: an object is tried once.
_HEAD_OF_SETS, _HEAD_OF_IDS = copy.deepcopy(_HEAD), copy.deepcopy(_HEAD)
_LOGITS = {"logits": torch.linspace(-2.0, 2.0, 60).reshape(2, 6, 5), "token_ids": IDS}
_VALUES = {"values": TOKENS, "returns": STEPS, "old_values": -TOKENS, "clip": 0.2}
_TEMPERATURES = torch.linspace(0.5, 2.0, 12).reshape(2, 6)
_LOGITS_OF_SETS, _LOGITS_OF_IDS = copy.deepcopy(_LOGITS), copy.deepcopy(_LOGITS)
# Two ids of each token: its own, and the next one.
PAIRS = torch.stack((IDS, (IDS + 1) % 5), -1)
SUPPORT = TokenSupport.from_padded(PAIRS)


def subjects() -> list[Subject]:
    """Return every public function, with per-step, per-token, packed and masked arguments."""
    steps = layout()
    packed = {"cu_seqlens": CUTS}
    named = package
    per_token = dict(_LOSS, advantages=TOKENS)
    for name in ("step_weights", "clip_low", "clip_high"):
        del per_token[name]
    rows = {"mask": MASK, "valid": torch.tensor([True, True])}
    markers = {"start": [1, 2], "end": 3}
    log_probs = {"log_probs": TOKENS, "entropy": TOKENS.abs()}
    head_leaves = ("hidden", "weight", "bias")
    return [
        Subject("from_mask", StepLayout.from_mask, {"mask": MASK, "boundaries": MASK}),
        Subject("from_mask of counted steps", StepLayout.from_mask,
                {"mask": MASK, "steps_per_row": [2, 2]}),
        Subject("from_mask packed", StepLayout.from_mask, {"mask": MASK.flatten(), **packed}),
        Subject("from_step_ids", StepLayout.from_step_ids, {"step_ids": STEP_IDS}),
        Subject(
            "from_step_ids packed",
            StepLayout.from_step_ids,
            {"step_ids": torch.where(MASK.flatten(), 1, -1), **packed},
        ),
        Subject(
            "from_rows", StepLayout.from_rows,
            {**rows, "trajectory_ids": [7, 7], "step_indices": [0, 1]},
        ),
        Subject(
            "from_rows strings", StepLayout.from_rows,
            {**rows, "trajectory_ids": ["a", "b"], "step_indices": torch.tensor([0, 1])},
        ),
        Subject(
            "from_markers", StepLayout.from_markers,
            {"token_ids": IDS, **markers, "stop": [4], "valid": torch.ones_like(MASK)},
        ),
        Subject(
            "from_markers packed", StepLayout.from_markers,
            {"token_ids": IDS.flatten(), "start": torch.tensor([1, 2]), "end": 3, **packed},
        ),
        Subject("keep", StepLayout.keep, {"self": steps, "mask": IDS > 1}),
        Subject("per_token", StepLayout.per_token, {"self": steps}),
        Subject("per_trajectory", StepLayout.per_trajectory, {"self": steps}),
        Subject("to", StepLayout.to, {"self": steps, "device": "cpu"}),
        Subject("reduction_weights", StepLayout.reduction_weights,
                {"self": steps, "reduction": "trajectory_mean"}),
        Subject("support from_csr", TokenSupport.from_csr,
                {"ids": PAIRS.flatten(), "offsets": 2 * torch.arange(13), "shape": [2, 6]}),
        Subject("support from_padded", TokenSupport.from_padded, {"ids": PAIRS, "pad": 7}),
        Subject("support from_lists", TokenSupport.from_lists,
                {"sets": [(0, 1)] * 6, "mask": MASK}),
        Subject("support from_mask", TokenSupport.from_mask, {"mask": MASK}),
        Subject("support to", TokenSupport.to, {"self": SUPPORT, "device": "cpu"}),
        Subject("StepPOConfig", StepPOConfig, {"dual_clip": 2.0, "kl_coef": 0.5}),
        Subject("StepPOConfig clipped tokens", StepPOConfig,
                {"token_clip": (0.2, 0.3), "surrogate": "mask", "ratio": "product"}),
        Subject("StepPOConfig soft", StepPOConfig,
                {"surrogate": "soft", "soft_temperature": (1.0, 2.0), "ratio": "token"}),
        Subject("broadcast_to_tokens", named.broadcast_to_tokens,
                {"per_step": STEPS, "layout": steps}, ("per_step",)),
        Subject("check_step_ends", named.check_step_ends,
                {"layout": steps, "token_ids": ENDED, "end": 4}),
        Subject("step_gae", named.step_gae,
                {"rewards": TOKENS, "values": TOKENS, "layout": steps,
                 "bootstrap_values": torch.tensor([0.5, -0.5])}),
        Subject("step_gae per step", named.step_gae,
                {"rewards": STEPS, "values": STEPS.flip(0).contiguous(), "layout": steps}),
        Subject("step_returns", named.step_returns,
                {"rewards": TOKENS, "layout": steps, "gamma": 0.9,
                 "bootstrap_values": torch.tensor([0.5, -0.5])}),
        Subject("group_normalize", named.group_normalize,
                {"values": STEPS, "groups": torch.tensor([0, 1]), "layout": steps}),
        Subject("group_normalize of names", named.group_normalize,
                {"values": STEPS, "groups": ["a", "b", "a", "b"], "std": False}),
        Subject("step_value_loss", named.step_value_loss,
                {**_VALUES, "layout": steps, "normalizer": 3.0, "step_weights": STEPS.abs()},
                ("values",)),
        Subject("step_value_loss of returns by token", named.step_value_loss,
                {**_VALUES, "returns": TOKENS, "layout": steps}, ("values",)),
        Subject("StepValueLoss", named.StepValueLoss(clip=0.2).forward,
                {"values": STEPS, "returns": STEPS.abs(), "layout": steps}, ("values",)),
        Subject("steppo_loss", named.steppo_loss,
                {**log_probs, **_LOSS, "layout": steps}, ("log_probs", "entropy")),
        Subject("steppo_loss of a mask", named.steppo_loss,
                {**log_probs, **per_token, "layout": MASK}, ("log_probs", "entropy")),
        Subject("steppo_loss centered", named.steppo_loss,
                {**log_probs, **_LOSS, "layout": steps, "ratio_center": 0.1,
                 "config": StepPOConfig(ratio="centered")}, ("log_probs",)),
        Subject("steppo_loss per token", named.steppo_loss,
                {**log_probs, **_LOSS, "advantages": TOKENS, "is_weights": STEPS.abs(),
                 "layout": steps, "config": StepPOConfig(ratio="token", surrogate="tv")},
                ("log_probs", "entropy")),
        Subject("steppo_loss with clipped tokens", named.steppo_loss,
                {**log_probs, **_LOSS, "advantages": TOKENS, "layout": steps,
                 "config": StepPOConfig(surrogate="quadratic", token_clip=(0.1, 0.2)),
                 "clip_low": STEPS.abs(), "clip_high": STEPS.abs()}, ("log_probs",)),
        Subject("step_log_ratios", named.step_log_ratios,
                {"log_probs": TOKENS, "old_log_probs": TOKENS.flip(0).contiguous(),
                 "layout": steps, "ratio": "centered", "ratio_center": 0.1}, ("log_probs",)),
        Subject("rollout_weights", named.rollout_weights,
                {"old_log_probs": TOKENS, "rollout_log_probs": TOKENS.flip(0).contiguous(),
                 "layout": steps, "level": "token", "low": 0.5, "high": 2.0}),
        Subject("rollout_weights of trajectories", named.rollout_weights,
                {"old_log_probs": TOKENS, "rollout_log_probs": TOKENS.flip(0).contiguous(),
                 "layout": steps, "level": "trajectory", "outside": "mask", "high": 1.5}),
        Subject("StepPOLoss", named.StepPOLoss().forward,
                {"log_probs": TOKENS, "old_log_probs": TOKENS, "advantages": STEPS,
                 "layout": steps}, ("log_probs",)),
        Subject("token_log_probs", named.token_log_probs,
                {**_LOGITS, "mask": MASK, "temperature": 1.5, "return_entropy": True},
                ("logits",)),
        Subject("token_log_probs temperatures", named.token_log_probs,
                {**_LOGITS, "temperature": _TEMPERATURES}, ("logits",)),
        Subject("token_log_probs over sets", named.token_log_probs,
                {**_LOGITS_OF_SETS, "mask": MASK.clone(), "support": SUPPORT}, ("logits",)),
        Subject("token_log_probs of several ids", named.token_log_probs,
                {**_LOGITS_OF_IDS, "token_ids": PAIRS, "mask": MASK.clone()}, ("logits",)),
        Subject("steppo_loss_from_logits over sets", named.steppo_loss_from_logits,
                {**_LOGITS_OF_SETS, **_LOSS, "layout": steps, "support": SUPPORT}, ("logits",)),
        Subject("linear_token_log_probs over sets", named.linear_token_log_probs,
                {**_HEAD_OF_SETS, "mask": MASK.clone(), "support": SUPPORT}, head_leaves),
        Subject("linear_token_log_probs of several ids", named.linear_token_log_probs,
                {**_HEAD_OF_IDS, "token_ids": PAIRS, "mask": MASK.clone()}, head_leaves),
        Subject("linear_steppo_loss over sets", named.linear_steppo_loss,
                {**_HEAD_OF_SETS, **_LOSS, "layout": steps, "support": SUPPORT}, head_leaves),
        Subject("steppo_loss_from_logits", named.steppo_loss_from_logits,
                {**_LOGITS, **_LOSS, "layout": steps, "temperature": _TEMPERATURES}, ("logits",)),
        Subject("steppo_loss_from_logits of a mask", named.steppo_loss_from_logits,
                {**_LOGITS, **per_token, "layout": MASK}, ("logits",)),
        Subject("linear_token_log_probs", named.linear_token_log_probs,
                {**_HEAD, "mask": MASK, "return_entropy": True}, head_leaves),
        Subject("linear_token_log_probs temperatures", named.linear_token_log_probs,
                {**_HEAD, "temperature": _TEMPERATURES}, head_leaves),
        Subject("linear_steppo_loss", named.linear_steppo_loss,
                {**_HEAD, **_LOSS, "layout": steps}, head_leaves),
        Subject("linear_steppo_loss of a mask", named.linear_steppo_loss,
                {**_HEAD, **per_token, "layout": MASK, "temperature": _TEMPERATURES},
                head_leaves),
    ]  # fmt: skip


def covered() -> tuple[set[str], set[str]]:
    """Return the public callables, and those of them that a subject calls."""
    public = {name for name in package.__all__ if inspect.isfunction(getattr(package, name))}
    for kind in (StepLayout, TokenSupport):
        for name, member in vars(kind).items():
            made = inspect.isfunction(member) or isinstance(member, classmethod)
            if made and not name.startswith("_"):
                public.add(name)
    # It takes nothing but the layout and computes nothing.
    public -= {"tensors"}
    called = {getattr(subject.function, "__name__", "") for subject in subjects()}
    return public, called


def cases(subject: Subject, parameter: str) -> Iterator[Case]:
    """Yield the replacements of one argument.

    A parameter without an ordinary value is replaced all the same, by forms of a tensor of the
    token shape.
    """
    base = subject.ordinary(parameter)
    if isinstance(base, torch.Tensor):
        yield from of_tensor(base)
    elif isinstance(base, StepLayout):
        yield from of_layout(base)
        if parameter == "self":
            return
        yield from (case._replace(plain=None) for case in of_tensor(MASK))
    elif isinstance(base, list):
        yield from of_sequence(base)
    elif base is None:
        yield from (case._replace(plain=None) for case in of_tensor(TOKENS))
        yield from (case._replace(plain=None) for case in of_tensor(MASK))
    elif isinstance(base, (int, float)) and not isinstance(base, bool):
        yield from of_number(base)
    yield from of_anything()


def replaced() -> Iterator[tuple[Subject, list[str]]]:
    """Yield each subject and the parameters that no subject before it has replaced alike."""
    seen: list[tuple[object, str, object]] = []
    for subject in subjects():
        fresh = []
        for parameter in subject.parameters:
            what = subject.function, parameter, subject.ordinary(parameter)
            known = any(what[:2] == other[:2] and what[2] is other[2] for other in seen)
            if parameter != "backend" and not known:
                fresh.append(parameter)
                seen.append(what)
        yield subject, fresh
