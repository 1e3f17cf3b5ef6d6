"""What ranks do with their shards of an output head, and what one process makes of the whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from head_cases import HeadCase, head_case
from torch import Tensor, distributed

from steppo_kernels import StepPOConfig, linear_steppo_loss, linear_token_log_probs

# Of the loss: what may differ from default, by name.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bonus": {
        "config": StepPOConfig(clip_low=0.05, clip_high=0.05, entropy_coef=0.01, kl_coef=0.1),
        "ref": True,
    },
    "centered": {"config": StepPOConfig(ratio="centered", clip_low=0.2, clip_high=0.2)},
    "token": {
        "config": StepPOConfig(ratio="token", clip_low=0.2, clip_high=0.2, reduction="token_mean")
    },
    "entropy-reported": {"report_entropy": True},
}


def bounds(vocabulary: int, size: int) -> list[int]:
    """Return where the shards of DTensor's ``Shard(0)`` begin and end."""
    part = -(-vocabulary // size)
    return [min(rank * part, vocabulary) for rank in range(size)] + [vocabulary]


@contextlib.contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Note each collective and the bytes that this rank gives to it."""
    found: list[tuple[str, int]] = []
    whole = {
        name: getattr(distributed, name)
        for name in ("all_gather", "all_reduce", "all_gather_object", "broadcast", "barrier")
    }

    def noting(name: str) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            given = args[1] if name == "all_gather" else args[0]
            found.append((name, given.nbytes if isinstance(given, Tensor) else 0))
            return whole[name](*args, **options)

        return run

    for name in whole:
        setattr(distributed, name, noting(name))
    try:
        yield found
    finally:
        for name, original in whole.items():
            setattr(distributed, name, original)


def options_of(case: HeadCase, backend: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of a loss."""
    options = {**extra, "backend": backend}
    if options.pop("ref", False):
        options["ref_log_probs"] = case.ref_log_probs
    if options.get("temperature") == "by token":
        options["temperature"] = case.temperatures
    return options


def shard_of(case: HeadCase, first: int, last: int) -> HeadCase:
    """Return the case with rows `first` to `last` of the head alone."""
    part = replace(case)
    part.weight = case.weight.detach()[first:last].clone().requires_grad_()
    part.bias = case.bias.detach()[first:last].clone().requires_grad_()
    part.hidden = case.hidden.detach().clone().requires_grad_()
    return part


def loss_of(case: HeadCase, has_bias: bool, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the loss and what there is to compare of it."""
    bias = case.bias if has_bias else None
    out = linear_steppo_loss(
        case.hidden,
        case.weight,
        case.token_ids,
        case.old_log_probs,
        case.advantages,
        case.layout,
        bias=bias,
        **options,
    )
    names = ("hidden", "weight", "bias") if has_bias else ("hidden", "weight")
    found = case.gradients(1.5 * out.loss, *names)
    found["loss"], found["metrics"] = out.loss.detach(), out.metrics.values
    return out, found


def log_probs_of(case: HeadCase, has_bias: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Return log-probs, entropies and gradients of a function of both."""
    log_probs, entropy = linear_token_log_probs(
        case.hidden,
        case.weight,
        case.token_ids,
        bias=case.bias if has_bias else None,
        mask=case.mask,
        return_entropy=True,
        **options,
    )
    weights = case.token_weights.to(log_probs.dtype) * case.mask
    names = ("hidden", "weight", "bias") if has_bias else ("hidden", "weight")
    found = case.gradients((weights * log_probs + (weights - 1) * entropy).sum(), *names)
    found["log_probs"], found["entropy"] = log_probs.detach(), entropy.detach()
    return found


def one_rank(
    rank: int,
    size: int,
    drawn: dict[str, Any],
    dtype: torch.dtype,
    backend: str,
    what: str,
    has_bias: bool,
    extra: dict[str, Any],
) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """Return what a rank with its shard finds, and which collectives it took part in."""
    case = head_case(**drawn).to(dtype)
    ends = bounds(len(case.weight), size)
    part = shard_of(case, ends[rank], ends[rank + 1])
    options = options_of(case, backend, extra)
    options["tp_group"] = distributed.group.WORLD
    with counted() as collectives:
        if what == "loss":
            _, found = loss_of(part, has_bias, options)
        else:
            found = log_probs_of(part, has_bias, options)
    return found, collectives


def whole(
    drawn: dict[str, Any],
    dtype: torch.dtype,
    backend: str,
    what: str,
    has_bias: bool,
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Return what one process finds with all of the head."""
    case = head_case(**drawn).to(dtype)
    options = options_of(case, backend, extra)
    if what == "loss":
        return loss_of(case, has_bias, options)[1]
    return log_probs_of(case, has_bias, options)
