"""What ranks do with their shards of an output head, and what one process makes of the whole."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from collectives import counted
from head_cases import HeadCase, head_case
from kept_cases import break_even, kept_of
from torch import Tensor, distributed

from steppo_kernels import StepPOConfig, TokenSupport, linear_steppo_loss, linear_token_log_probs

_WIDE = {"clip_low": 0.2, "clip_high": 0.2}
# Of the loss: what differs from the default, by name.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all terms": {
        "config": StepPOConfig(**_WIDE, entropy_coef=0.01, kl_coef=0.1),
        "ref_log_probs": "of the case",
    },
    "centered": {"config": StepPOConfig(ratio="centered", **_WIDE)},
    "token": {"config": StepPOConfig(ratio="token", **_WIDE, reduction="token_mean")},
    "entropy reported": {"report_entropy": True},
}
# Of the head.
HEADS: dict[str, dict[str, Any]] = {
    "usual": {},
    "in chunks": {"chunk_tokens": 7},
    "all options": {"softcap": 2.0, "temperature": "of the case", "chunk_tokens": 5, "bias": True},
    "over sets": {"support": "random", "bias": True, "break_even": 0},
    "over sets in chunks": {"support": "nested", "chunk_tokens": 5, "break_even": 10**6},
    "over some sets": {
        "support": "some empty",
        "softcap": 2.0,
        "temperature": "of the case",
        "chunk_tokens": 5,
        "break_even": 0,
    },
}


class Task(NamedTuple):
    """One call.

    Attributes:
        drawn: arguments of `head_case`.
        dtype, backend: of the call.
        what: "loss" or "log-probs".
        objective, head: names in `OBJECTIVES` and `HEADS`.
        wanted: what wants a gradient.
    """

    drawn: dict[str, Any]
    dtype: torch.dtype
    backend: str
    what: str = "loss"
    objective: str = "plain"
    head: str = "usual"
    wanted: tuple[str, ...] = ("hidden", "weight", "bias")


def bounds(vocabulary: int, size: int) -> list[int]:
    """Return where the shards of DTensor's ``Shard(0)`` begin and end."""
    part = -(-vocabulary // size)
    return [min(rank * part, vocabulary) for rank in range(size)] + [vocabulary]


def shard_of(case: HeadCase, rank: int, size: int) -> HeadCase:
    """Return the case with the rows of the head that a rank has."""
    ends = bounds(len(case.weight), size)
    rows = slice(ends[rank], ends[rank + 1])
    part = replace(case)
    part.hidden = case.hidden.detach().clone().requires_grad_()
    part.weight = case.weight.detach()[rows].clone().requires_grad_()
    part.bias = case.bias.detach()[rows].clone().requires_grad_()
    return part


def found_in(task: Task, case: HeadCase, **more: Any) -> dict[str, Any]:
    """Return what there is to compare of a call, `more` being further arguments of it."""
    options = {**HEADS[task.head], **more, "backend": task.backend}
    # Whether the logits of sets are gathered, or come from products with the whole shard.
    with break_even(options.pop("break_even", 0)):
        return _found_in(task, case, options)


def _found_in(task: Task, case: HeadCase, options: dict[str, Any]) -> dict[str, Any]:
    if options.get("temperature") == "of the case":
        options["temperature"] = case.temperatures
    if "support" in options:
        whole = head_case(**task.drawn)
        options["support"] = TokenSupport.from_mask(kept_of(options["support"], whole))
    has_bias = options.pop("bias", False)
    if has_bias:
        options["bias"] = case.bias
    for name in ("hidden", "weight", "bias"):
        getattr(case, name).requires_grad_(name in task.wanted)
    names = [name for name in task.wanted if name != "bias" or has_bias]
    given = case.hidden, case.weight, case.token_ids
    if task.what == "loss":
        options |= OBJECTIVES[task.objective]
        if "ref_log_probs" in options:
            options["ref_log_probs"] = case.ref_log_probs
        objective = case.old_log_probs, case.advantages, case.layout
        out = linear_steppo_loss(*given, *objective, **options)
        metrics = out.metrics.values[: len(out.metrics.names)]
        found = {"loss": out.loss.detach(), "metrics": metrics}
        found["step_log_ratio"] = out.step_log_ratio
        upstream = 1.5 * out.loss
    else:
        options |= {"mask": case.mask, "return_entropy": True}
        log_probs, entropy = linear_token_log_probs(*given, **options)
        found = {"log_probs": log_probs.detach(), "entropy": entropy.detach()}
        weights = case.token_weights.to(log_probs.dtype) * case.mask
        # Some rows are dead.
        weights[..., ::3] = 0
        upstream = (weights * (log_probs - 0.5 * entropy)).sum()
    if names:
        found |= case.gradients(upstream, *names)
    return found


def on_ranks(
    rank: int, size: int, tasks: list[Task]
) -> list[tuple[dict[str, Any], list[tuple[str, int]]]]:
    """Return what a rank with its shard finds in each call, and its collectives."""
    answers = []
    for task in tasks:
        case = shard_of(head_case(**task.drawn).to(task.dtype), rank, size)
        with counted() as said:
            found = found_in(task, case, tp_group=distributed.group.WORLD)
        answers.append((found, said.words()))
    return answers


def alone(task: Task) -> dict[str, Any]:
    """Return what one process finds with all of the head."""
    return found_in(task, head_case(**task.drawn).to(task.dtype))


def evaluations(lengths: list[int], chunk: int) -> int:
    """Return how many chunks of logits are formed: whole steps together, long ones twice."""
    total, open_tokens = 0, 0
    for length in lengths:
        if open_tokens and open_tokens + length > chunk:
            total, open_tokens = total + 1, 0
        if length > chunk:
            total += 2 * math.ceil(length / chunk)
        else:
            open_tokens += length
    return total + (open_tokens > 0)


# Of the tests of arguments and failures.
DRAWN = {"seed": 4, "rows": 2, "vocabulary": 7}


def log_probs_of(case: HeadCase, **options: Any) -> Tensor:
    """Return log-probs of a rank's shard."""
    options = {"mask": case.mask, "tp_group": distributed.group.WORLD, **options}
    found = linear_token_log_probs(case.hidden, case.weight, case.token_ids, **options)
    assert isinstance(found, Tensor)
    return found


def works(rank: int, size: int) -> bool:
    """Whether the ranks still understand each other."""
    case = head_case(**DRAWN).to(torch.float64)
    part = shard_of(case, rank, size)
    log_probs = log_probs_of(part)
    log_probs.sum().backward()
    whole = linear_token_log_probs(case.hidden, case.weight, case.token_ids, mask=case.mask)
    whole.sum().backward()
    assert part.hidden.grad is not None
    torch.testing.assert_close(log_probs, whole)
    torch.testing.assert_close(part.hidden.grad, case.hidden.grad)
    return True
