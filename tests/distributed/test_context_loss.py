"""The loss from the hidden states of each rank's tokens, against one process with all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from collectives import counted, error_of
from functions_of_steps import close
from head_cases import head_case
from heads import bounds
from methods import METHODS
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from worlds import Worlds

from steppo_kernels import StepLayout, StepPOConfig, linear_steppo_loss
from steppo_kernels.config import REDUCTIONS
from steppo_kernels.distributed import (
    ContextShard,
    batch_reduction,
    context_linear_steppo_loss,
    merge_metrics,
)

SIZES = (2, 3)
CONFIG = StepPOConfig(clip_low=0.05, clip_high=0.05)


def compare(
    case: Any, shard: ContextShard, what: str, *, masked: bool = False, **options: Any
) -> tuple[str, Tensor, list[Tensor], list[Tensor]]:
    """Return loss, exact and own gradients of the weight and the bias; the rest is checked here.

    Gradients of hidden states are those of one process, and so are the metrics.
    """
    case = case.to(torch.float64)
    per_token = {"temperature": case.temperatures} if options.pop("temperatures", False) else {}
    bias = case.bias if options.pop("biased", False) else None
    layout = case.mask if masked else case.layout
    advantages = case.token_weights - 0.9 if masked else case.advantages
    constants = (case.old_log_probs, advantages, layout)
    config = options.get("config", CONFIG)
    options = {"config": CONFIG, "bias": bias, **options}
    if config.kl_coef:
        options["ref_log_probs"] = case.ref_log_probs
    leaves = [case.hidden, case.weight, *([] if bias is None else [bias])]
    exact = linear_steppo_loss(
        case.hidden, case.weight, case.token_ids, *constants, **options, **per_token
    )
    own = shard.local(case.hidden.detach()).requires_grad_()
    with counted() as said:
        found = context_linear_steppo_loss(
            own,
            case.weight,
            shard.local(case.token_ids),
            *constants,
            shard,
            **options,
            **{name: shard.local(value) for name, value in per_token.items()},
        )
        grads = torch.autograd.grad(found.loss, [own, *leaves[1:]])
    assert said.names == ["all_gather"] * 2, what
    close(found.loss, exact.loss, what)
    for key, value in exact.metrics.as_dict().items():
        close(found.metrics[key], torch.tensor(value, dtype=torch.float64), f"{what}, {key}")
    close(found.step_log_ratio, exact.step_log_ratio, what)
    expected = torch.autograd.grad(exact.loss, leaves)
    close(grads[0], expected[0][:, shard.columns], f"{what}, hidden")
    return what, found.loss.detach(), list(expected[1:]), list(grads[1:])


def every_method(rank: int, size: int) -> list[Any]:
    found = []
    for seed, (name, method) in enumerate(METHODS.items()):
        case = head_case(seed)
        terms = {"kl_coef": 0.1, "entropy_coef": 0.05} if seed % 2 else {}
        config = method.config(reduction="token_mean" if seed % 3 else "step_mean", **terms)
        shard = (ContextShard.zigzag, ContextShard.contiguous)[seed % 2](17)
        options: dict[str, Any] = {
            "config": config,
            "chunk_tokens": (None, 3, 8)[seed % 3],
            "biased": seed % 2 == 0,
            "temperatures": seed % 4 == 1,
            "softcap": 3.0 if seed % 5 == 2 else None,
            "report_entropy": seed % 3 == 0,
            "masked": seed % 7 == 3,
            "backend": "reference" if seed % 6 == 5 else "auto",
        }
        if method.ratio == "centered" and seed % 2:
            options["ratio_center"] = 0.01
        found.append(compare(case, shard, f"{name}, {shard}", **options))
    return found


def check_sums(every: list[list[Any]]) -> None:
    """Losses of the ranks have the same bits; gradients of the weight add up."""
    for ranks in zip(*every, strict=True):
        what, loss, expected, _ = ranks[0]
        assert all(torch.equal(other, loss) for _, other, *_ in ranks), what
        for place, exact in enumerate(expected):
            close(sum(own[place] for *_, own in ranks), exact, f"{what}, parameter {place}")


@pytest.mark.parametrize("size", SIZES)
def test_every_method(worlds: Worlds, size: int) -> None:
    every = worlds.run(size, every_method)
    assert len(every[0]) == len(METHODS)
    check_sums(every)


MASKS = {
    "a step over all ranks": torch.ones(3, 17, dtype=torch.bool),
    "steps of one token": (torch.arange(17) % 2 == 0).expand(3, 17),
    "tokens of the first rank alone": (torch.arange(17) < 2).expand(3, 17),
    "no action token": torch.zeros(3, 17, dtype=torch.bool),
}


def shapes_of_steps(rank: int, size: int) -> list[Any]:
    found = []
    for name, mask in MASKS.items():
        drawn = head_case(3)
        layout = StepLayout.from_mask(mask)
        # All tokens have numbers here; the masked ones get NaN again.
        numbers = torch.Generator().manual_seed(1)
        fill = {
            "hidden": torch.randn((3, 17, 5), generator=numbers, dtype=torch.float64),
            "old_log_probs": -2 * torch.rand((3, 17), generator=numbers, dtype=torch.float64),
        }
        case = dataclasses.replace(
            drawn,
            mask=mask,
            layout=layout,
            hidden=torch.where(mask[..., None], fill["hidden"], torch.nan),
            old_log_probs=torch.where(mask, fill["old_log_probs"], torch.nan),
            token_ids=torch.where(mask, torch.arange(17) % 11, -100),
            advantages=torch.linspace(-1, 1, layout.num_steps, dtype=torch.float64),
        )
        for kind in ("contiguous", "zigzag", "the last has none"):
            if kind == "the last has none":
                columns = range(17)[rank :: size - 1] if rank < size - 1 else []
                shard = ContextShard.of_columns(list(columns), 17)
            else:
                shard = getattr(ContextShard, kind)(17)
            options: Any = {"config": StepPOConfig(clip_low=0.9, clip_high=3.0), "biased": True}
            for backend in ("auto", "reference"):
                what = f"{name}, {kind}, {backend}"
                found.append(compare(case, shard, what, backend=backend, **options))
    return found


@pytest.mark.parametrize("size", SIZES)
def test_shapes_of_steps(worlds: Worlds, size: int) -> None:
    check_sums(worlds.run(size, shapes_of_steps))


def data_and_context(rank: int, size: int) -> None:
    """Two data-parallel ranks with rows of their own, and two or one ranks for the tokens of each.

    The gradients of all ranks are averaged, as FSDP does over such a mesh.
    """
    shape = (2, size // 2)
    mesh = torch.distributed.init_device_mesh("cpu", shape, mesh_dim_names=("data", "context"))
    case = head_case(2, rows=5).to(torch.float64)
    constants = (case.old_log_probs, case.advantages, case.layout)
    for reduction in REDUCTIONS:
        config = dataclasses.replace(CONFIG, reduction=reduction)
        exact = linear_steppo_loss(
            case.hidden, case.weight, case.token_ids, *constants, config=config
        )
        (expected,) = torch.autograd.grad(exact.loss, case.weight)
        rows = slice(0, 4) if mesh["data"].get_local_rank() == 0 else slice(4, 5)
        layout = StepLayout.from_mask(case.mask[rows])
        normalizer = batch_reduction(layout, reduction, group=mesh["data"]).normalizer
        shard = ContextShard.zigzag(17, group=mesh["context"])
        found = context_linear_steppo_loss(
            shard.local(case.hidden[rows]),
            case.weight,
            shard.local(case.token_ids[rows]),
            case.old_log_probs[rows],
            case.advantages[case.layout.step_ids[rows].long()],
            layout,
            shard,
            config=config,
            normalizer=normalizer / shard.size,
        )
        (grad,) = torch.autograd.grad(found.loss, case.weight)
        torch.distributed.all_reduce(grad)
        close(grad / size, expected, reduction)
        merged = merge_metrics(found.metrics, group=mesh["data"])
        # These still have the factor that makes up for the average over the ranks of the shard.
        close(merged["policy_loss"] / shard.size, exact.metrics["policy_loss"], reduction)
        close(merged["ratio_mean"], exact.metrics["ratio_mean"], reduction)


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_that_are_averaged_over_data_and_context(worlds: Worlds, size: int) -> None:
    worlds.run(size, data_and_context)


def context_and_vocabulary(rank: int, size: int) -> None:
    """Two ranks for the tokens, each of them two that share the head."""
    mesh = torch.distributed.init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("cp", "tp"))
    case = head_case(3, vocabulary=7).to(torch.float64)
    constants = (case.old_log_probs, case.advantages, case.layout)
    config = StepPOConfig(clip_low=0.05, clip_high=0.05, entropy_coef=0.01)
    exact = linear_steppo_loss(case.hidden, case.weight, case.token_ids, *constants, config=config)
    expected = torch.autograd.grad(exact.loss, [case.hidden, case.weight])
    shard = ContextShard.zigzag(17, group=mesh["cp"])
    ends = bounds(7, size // 2)
    place = mesh["tp"].get_local_rank()
    rows = slice(ends[place], ends[place + 1])
    hidden = shard.local(case.hidden.detach()).requires_grad_()
    weight = case.weight.detach()[rows].clone().requires_grad_()
    # As `parallelize_module` makes them.
    placed = [
        DTensor.from_local(hidden, mesh["tp"], [Replicate()]),
        distribute_tensor(case.weight.detach(), mesh["tp"], [Shard(0)]).requires_grad_(),
    ]
    ways: list[tuple[Any, Any, int | None]] = [
        (hidden, weight, None),
        (hidden, weight, ends[place]),
        (placed[0], placed[1], None),
    ]
    for states, head, start in ways:
        found = context_linear_steppo_loss(
            states,
            head,
            shard.local(case.token_ids),
            *constants,
            shard,
            config=config,
            chunk_tokens=4,
            tp_group=mesh["tp"],
            vocab_start=start,
        )
        close(found.loss, exact.loss, "loss")
        grads = [
            grad.to_local() if isinstance(grad, DTensor) else grad
            for grad in torch.autograd.grad(found.loss, [hidden, head])
        ]
        close(grads[0], expected[0][:, shard.columns], "hidden")
        torch.distributed.all_reduce(grads[1], group=mesh["cp"].get_group())
        close(grads[1], expected[1][rows], "weight")
    # An error of one rank is told over both of its groups.
    ids = shard.local(case.token_ids).clamp(0, 6)
    ids[0, 0] = 7 if rank == size - 1 else ids[0, 0]
    every = StepLayout.from_mask(torch.ones_like(case.mask))

    def failing(states: Any, **options: Any) -> str:
        return error_of(
            lambda: context_linear_steppo_loss(
                states,
                weight,
                ids,
                None,
                torch.ones(every.num_steps),
                every,
                shard,
                **options,
            )
        )

    failed = failing(hidden.detach().nan_to_num(), tp_group=mesh["tp"])
    assert failed.startswith("ValueError" if rank == size - 1 else "RuntimeError"), failed
    failed = failing(placed[0])
    assert failed.startswith("TypeError: hidden: got a DTensor, expected a whole tensor"), failed
    parted = DTensor.from_local(hidden.detach(), mesh["tp"], [Shard(1)])
    failed = failing(parted, tp_group=mesh["tp"])
    assert failed.startswith("ValueError: hidden: got a DTensor placed as (Shard(dim=1),)"), failed
    shard.whole(torch.zeros(3, len(shard.columns)))


@pytest.mark.parametrize("size", [2, 4])
def test_tokens_and_vocabulary_are_both_split(worlds: Worlds, size: int) -> None:
    worlds.run(size, context_and_vocabulary)


def half_precision(rank: int, size: int) -> list[Tensor]:
    """Of bf16 states, log-probs are fp32; packed tokens are one dimension."""
    case = head_case(6, rows=1, length=40).to(torch.bfloat16)
    shard = ContextShard.zigzag(40, dim=0)
    layout = StepLayout.from_mask(case.mask[0])
    own = shard.local(case.hidden.detach()[0]).requires_grad_()
    constants = (case.old_log_probs[0].float(), case.advantages.float(), layout)
    ids = shard.local(case.token_ids[0])
    out = context_linear_steppo_loss(own, case.weight, ids, *constants, shard, config=CONFIG)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert own.grad.dtype == case.weight.grad.dtype == torch.bfloat16
    exact = linear_steppo_loss(
        case.hidden[0], case.weight, case.token_ids[0], *constants, config=CONFIG
    )
    torch.testing.assert_close(out.loss, exact.loss, rtol=1e-5, atol=1e-6)
    return [out.loss.detach(), out.metrics.values]


@pytest.mark.parametrize("size", SIZES)
def test_packed_half_precision(worlds: Worlds, size: int) -> None:
    first, *others = worlds.run(size, half_precision)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other, first, strict=True))


def test_shard_that_is_none() -> None:
    case = head_case(2)
    constants = (case.old_log_probs, case.advantages, case.layout)
    with pytest.raises(TypeError, match=r"^shard: got NoneType, expected a ContextShard"):
        context_linear_steppo_loss(case.hidden, case.weight, case.token_ids, *constants, None)
