"""How shards of a head are given, what is refused, and what ranks say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from collectives import counted, error_of
from head_cases import HeadCase, head_case
from heads import DRAWN, Task, alone, bounds, evaluations, found_in, log_probs_of, shard_of, works
from targets import Target
from torch import Tensor, distributed
from worlds import Worlds

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    TokenSupport,
    linear_steppo_loss,
    linear_token_log_probs,
)
from steppo_kernels.distributed import ContextShard
from steppo_kernels.log_probs import sharded_head

# Ways to give shards.


def in_another_order(rank: int, size: int) -> dict[str, Tensor]:
    """The last rank has the first ids, and each rank another number of them."""
    case = head_case(**DRAWN).to(torch.float64)
    ends = [0, 1, 3, 7] if size == 3 else [0, 2, 7]
    place = size - 1 - rank
    case.weight = case.weight.detach()[ends[place] : ends[place + 1]].clone().requires_grad_()
    task = Task(DRAWN, torch.float64, "cpu", wanted=("hidden", "weight"))
    return found_in(task, case, tp_group=distributed.group.WORLD, vocab_start=ends[place])


@pytest.mark.parametrize("size", [2, 3])
def test_shards_in_any_order_and_of_any_size(worlds: Worlds, size: int) -> None:
    answers = worlds.run(size, in_another_order)
    exact = alone(Task(DRAWN, torch.float64, "cpu", wanted=("hidden", "weight")))
    for found in answers:
        torch.testing.assert_close(found["grad_hidden"], exact["grad_hidden"], equal_nan=True)
    rows = torch.cat([one["grad_weight"] for one in reversed(answers)])
    torch.testing.assert_close(rows, exact["grad_weight"])


def as_dtensors(rank: int, size: int, vocabulary: int, backend: str) -> list[float]:
    """A head as `parallelize_module` leaves it, and hidden states on every rank."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = distributed.init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    drawn = {**DRAWN, "vocabulary": vocabulary}
    errors = []
    for what in ("loss", "log-probs"):
        task = Task(drawn, torch.float64, backend, what, "all terms", "all options")
        case = head_case(**drawn).to(torch.float64)
        for name, placement in (("weight", Shard(0)), ("bias", Shard(0)), ("hidden", Replicate())):
            given = getattr(case, name).detach()
            setattr(case, name, distribute_tensor(given, mesh, [placement]).requires_grad_())
        found, exact = found_in(task, case, tp_group=mesh["tp"]), alone(task)
        for name, value in exact.items():
            got = found[name]
            if isinstance(got, DTensor):
                placement = Replicate() if name == "grad_hidden" else Shard(0)
                assert got.placements == (placement,), name
                got = got.full_tensor()
            errors.append(float((got - value).nan_to_num().abs().max()))
    return errors


@pytest.mark.parametrize("vocabulary", [25, 7, 4, 1])
def test_dtensors(worlds: Worlds, vocabulary: int) -> None:
    for errors in worlds.run(3, as_dtensors, vocabulary, "cpu"):
        assert max(errors) < 1e-12


def dtensors_that_are_refused(rank: int, size: int) -> list[str]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = distributed.init_device_mesh("cpu", (size,))
    case = head_case(**DRAWN).to(torch.float64)
    weight, hidden, found = case.weight.detach(), case.hidden.detach().nan_to_num(), []
    for given, states in (
        (distribute_tensor(weight, mesh, [Replicate()]), hidden),
        (distribute_tensor(weight, mesh, [Shard(1)]), hidden),
        (distribute_tensor(weight, mesh, [Shard(0)]), distribute_tensor(hidden, mesh, [Shard(0)])),
    ):
        case.weight, case.hidden = given, states
        found.append(error_of(lambda: log_probs_of(case)))
    case.weight, case.hidden = distribute_tensor(weight, mesh, [Shard(0)]), hidden
    found.append(error_of(lambda: log_probs_of(case, vocab_start=(1, 5)[rank])))
    other = distribute_tensor(case.bias.detach(), mesh, [Shard(0)])
    case.weight = weight[[slice(0, 3), slice(3, 7)][rank]]
    found.append(error_of(lambda: log_probs_of(case, bias=other, vocab_start=(0, 3)[rank])))
    turned = DeviceMesh("cpu", [1, 0])
    case.weight = distribute_tensor(weight, turned, [Shard(0)])
    found.append(error_of(lambda: log_probs_of(case)))
    case.weight = distribute_tensor(weight, mesh, [Shard(0)])
    found.append(error_of(lambda: log_probs_of(case, tp_group=None)))
    assert works(rank, size)
    return found


def test_dtensors_that_are_refused(worlds: Worlds) -> None:
    for found in worlds.run(2, dtensors_that_are_refused):
        for error, start in zip(
            found,
            (
                "ValueError: weight: got a DTensor placed as (Replicate(),), expected Shard(0)",
                "ValueError: weight: got a DTensor placed as (Shard(dim=1),), expected Shard(0)",
                "ValueError: hidden: got a DTensor placed as (Shard(dim=0),), expected all of it",
                "ValueError: vocab_start: got ",
                "ValueError: bias: got shape ",
                "ValueError: weight: got a DTensor over ranks [1, 0] in 1 dimensions, expected ",
                "TypeError: weight: got a DTensor, expected a whole tensor",
            ),
            strict=True,
        ):
            assert error.startswith(start), error
        assert "tp_group" in found[-1]


# What is refused.


def starts_that_are_refused(rank: int, size: int) -> list[str]:
    found = []
    for starts in ([0, 2], [0, 4], [1, 4], [-1, 3], [0, None], [2**70, 0]):
        case = shard_of(head_case(**{**DRAWN, "vocabulary": 6}).to(torch.float64), rank, size)
        found.append(error_of(lambda: log_probs_of(case, vocab_start=starts[rank])))  # noqa: B023
    case = shard_of(head_case(**DRAWN).to(torch.float64), rank, size)
    found.append(error_of(lambda: log_probs_of(case, tp_group=None, vocab_start=3)))
    empty = head_case(**DRAWN).to(torch.float64)
    empty.weight = empty.weight.detach()[:0]
    found.append(error_of(lambda: log_probs_of(empty)))
    found.append(error_of(lambda: log_probs_of(empty, tp_group=None)))
    assert works(rank, size)
    return found


_RANGES = ("0 to 2, 2 to 4", "0 to 2, 4 to 6", "1 to 3, 4 to 6")


def test_parts_that_are_no_whole(worlds: Worlds) -> None:
    first, second = worlds.run(2, starts_that_are_refused)
    for found in (first, second):
        for error, ranges in zip(found[:3], _RANGES, strict=True):
            assert error == (
                f"ValueError: vocab_start: got ids {ranges} on the ranks, expected every id from 0 "
                "on once"
            )
        assert "vocab_start is " in found[4]
        assert found[6] == "ValueError: vocab_start: got it without tp_group, expected None or both"
        assert found[7].startswith("ValueError: weight: got no row on any rank")
        assert found[8].startswith("ValueError: weight: got shape (0, 5)")
    assert first[5] == f"ValueError: vocab_start: got {2**70}, expected at most {2**62}"
    assert first[3] == "ValueError: vocab_start: got -1, expected at least 0"
    assert "rank 0 of tp_group raised ValueError: vocab_start: got -1" in second[3]


def differences(rank: int, size: int) -> dict[str, str]:
    """One rank is given something else than the others."""
    found = {}
    is_odd = rank == size - 1

    def attempt(name: str, change: Callable[[HeadCase, dict[str, Any]], None]) -> None:
        case = shard_of(head_case(**DRAWN).to(torch.float32), rank, size)
        options: dict[str, Any] = {"tp_group": distributed.group.WORLD, "bias": case.bias}
        if name == "is_weights by token":
            options["is_weights"] = torch.ones(case.layout.num_steps)
        if name == "sets":
            options["support"] = sets_with(case, 1)
        if is_odd:
            change(case, options)

        def run() -> None:
            torch.set_grad_enabled(not options.pop("no_grad", False))
            linear_steppo_loss(
                case.hidden,
                case.weight,
                case.token_ids,
                case.old_log_probs,
                case.advantages,
                case.layout,
                **options,
            )

        found[name] = error_of(run)
        torch.set_grad_enabled(True)

    def shorter(case: HeadCase, options: dict[str, Any]) -> None:
        case.layout = case.layout.keep(torch.arange(case.mask.numel()).view_as(case.mask) > 4)

    attempt("chunk_tokens", lambda case, options: options.update(chunk_tokens=3))
    attempt("config", lambda case, options: options.update(config=StepPOConfig(clip_low=0.1)))
    attempt("temperature", lambda case, options: options.update(temperature=0.5))
    attempt("softcap", lambda case, options: options.update(softcap=3.0))
    attempt("entropy", lambda case, options: options.update(report_entropy=True))
    attempt("rows", shorter)
    attempt("gradient of hidden", lambda case, options: case.hidden.requires_grad_(False))
    attempt("shape of hidden", lambda case, options: widen(case))
    attempt("not given", lambda case, options: vars(case).update(old_log_probs=None))
    attempt("gradient of weight", lambda case, options: case.weight.requires_grad_(False))
    attempt("gradient of bias", lambda case, options: case.bias.requires_grad_(False))
    attempt("bias", lambda case, options: options.update(bias=None))
    attempt("reference", lambda case, options: options.update(backend="reference"))
    attempt("lengths of steps", moved_border)
    attempt(
        "advantages by token",
        lambda case, options: vars(case).update(advantages=case.hidden[..., 0].detach()),
    )
    attempt(
        "is_weights by token", lambda case, options: options.update(is_weights=case.token_weights)
    )
    attempt("sets", lambda case, options: options.update(support=sets_with(case, 2)))
    attempt("gradients", lambda case, options: options.update(no_grad=True))
    assert works(rank, size)
    return found


def sets_with(case: HeadCase, step: int) -> TokenSupport:
    """Sets of two ids each: that of the token, and one that is so much larger."""
    own = torch.where(case.mask, case.token_ids, 0)
    return TokenSupport.from_padded(torch.stack((own, (own + step) % 7), -1))


def moved_border(case: HeadCase, options: dict[str, Any]) -> None:
    """As many steps and tokens, but a token belongs to another step."""
    ids = case.layout.step_ids.clone()
    first = int((ids >= 0).nonzero()[0, 1])
    row = ids[0]
    places = (row >= 0).nonzero().flatten()
    border = next(i for i in places[1:].tolist() if row[i] != row[places[0]])
    row[border] = row[first]
    case.layout = StepLayout.from_step_ids(ids)


def widen(case: HeadCase) -> None:
    case.hidden = torch.cat([case.hidden, case.hidden], -1)
    case.weight = torch.cat([case.weight, case.weight], -1)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_were_given_different_arguments(worlds: Worlds, size: int) -> None:
    answers = worlds.run(size, differences)
    for name, error in answers[0].items():
        assert error.startswith(
            "ValueError: tp_group: its ranks got different arguments, expected the same: "
        ), (name, error)
        assert f"{name} is " in error, (name, error)
        assert error.count(f"on rank {size - 1}") >= 1
        assert all(other[name] == error for other in answers[1:])


def other_budgets(rank: int, size: int) -> str:
    """Ranks whose devices have other sizes raise, unless chunks have a given size."""

    def call(head: str) -> None:
        task = Task(DRAWN, torch.float64, "cpu", head=head)
        case = shard_of(head_case(**DRAWN).to(task.dtype), rank, size)
        found_in(task, case, tp_group=distributed.group.WORLD)

    with mock.patch.object(sharded_head, "chunk_budget", return_value=2**20 + rank):
        error = error_of(lambda: call("usual"))
        call("in chunks")
    return error


def test_bytes_of_a_chunk_count_where_they_decide(worlds: Worlds) -> None:
    for error in worlds.run(2, other_budgets):
        assert "bytes of a chunk is 1048576 on rank 0, 1048577 on rank 1" in error


# The rules of all gradients.


def derivatives(rank: int, size: int, backend: str) -> list[str]:
    case = shard_of(head_case(**DRAWN).to(torch.float64), rank, size)
    log_probs = log_probs_of(case, backend=backend, chunk_tokens=4)
    total = (log_probs * torch.linspace(-1, 1, log_probs.shape[1])).sum()
    first = torch.autograd.grad(total, [case.hidden, case.weight], retain_graph=True)
    again = torch.autograd.grad(3 * total, [case.hidden, case.weight], create_graph=True)
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(3 * one, other, equal_nan=True)
    twice = error_of(lambda: again[0].nansum().backward())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = log_probs_of(case_in(case, torch.float32), backend=backend)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), log_probs.detach(), rtol=0.05, atol=0.05)
    with torch.no_grad():
        quiet = log_probs_of(case, backend=backend)
    assert not quiet.requires_grad
    assert torch.equal(quiet, log_probs_of(case, backend=backend))
    return [twice]


def case_in(case: HeadCase, dtype: torch.dtype) -> HeadCase:
    return case.to(dtype)


def test_second_derivatives_autocast_and_no_grad(target: Target, worlds: Worlds) -> None:
    for (twice,) in worlds.run(2, derivatives, target.backend):
        assert "got a second derivative" in twice


def compiled(rank: int, size: int) -> None:
    """Compiled code breaks its graph at what speaks to other ranks, and gives the same bits."""
    case = shard_of(head_case(**DRAWN).to(torch.float32), rank, size)
    group = {"tp_group": distributed.group.WORLD, "chunk_tokens": 5}

    def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
        given = 1.0 * hidden, weight, case.token_ids
        found = linear_token_log_probs(*given, mask=case.mask, **group)
        assert isinstance(found, Tensor)
        return (2 * found).sum()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        objective = case.old_log_probs, case.advantages, case.layout
        return (
            2 * linear_steppo_loss(1.0 * hidden, weight, case.token_ids, *objective, **group).loss
        )

    def tokens(hidden: Tensor, weight: Tensor) -> Tensor:
        shard = ContextShard.contiguous(hidden.shape[1])
        whole = shard.whole(2 * shard.local(hidden).nan_to_num().sum(-1))
        return whole.square().sum() + weight.sum()

    for function in (log_probs, loss, tokens):
        found = []
        for run in (function, torch.compile(function, backend="eager")):
            value = run(case.hidden, case.weight)
            found.append((value, *torch.autograd.grad(value, [case.hidden, case.weight])))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num()), function.__name__


def test_compiled_code(worlds: Worlds) -> None:
    worlds.run(2, compiled)


# Collectives.


def words_of(rank: int, size: int, chunk: int) -> dict[str, list[tuple[str, int]]]:
    said = {}
    drawn = {"seed": 1, "rows": 3, "length": 40, "vocabulary": 26, "mean_step": 9.0}
    case = shard_of(head_case(**drawn).to(torch.float32), rank, size)
    options = {"chunk_tokens": chunk, "tp_group": distributed.group.WORLD}
    given = case.hidden, case.weight, case.token_ids
    objective = case.old_log_probs, case.advantages, case.layout
    with counted() as said["loss"]:
        # Nothing is clipped: all rows are live.
        wide = StepPOConfig(clip_low=0.9, clip_high=9.0)
        out = linear_steppo_loss(*given, *objective, config=wide, **options)
    with counted() as said["backward of loss"]:
        out.loss.backward()
    with counted() as said["log-probs"]:
        log_probs = log_probs_of(case, **options)
    with counted() as said["backward of log-probs"]:
        log_probs.sum().backward()
    return {name: one.words() for name, one in said.items()}


@pytest.mark.parametrize(("size", "chunk"), [(2, 12), (3, 12), (2, 1000)])
def test_collectives_are_those_that_the_docstrings_say(
    worlds: Worlds, size: int, chunk: int
) -> None:
    drawn = {"seed": 1, "rows": 3, "length": 40, "vocabulary": 26, "mean_step": 9.0}
    case = head_case(**drawn)
    count, lengths = case.layout.num_tokens, case.layout.step_lengths.tolist()
    assert max(lengths) > 12, "no step is longer than a chunk"
    chunks = math.ceil(count / min(chunk, count))
    for found in worlds.run(size, words_of, chunk):
        names = {what: [name for name, _ in words] for what, words in found.items()}
        assert names["log-probs"] == ["all_gather"] * (2 + chunks)
        assert names["backward of log-probs"] == ["all_gather"] * (2 + chunks) + ["all_reduce"]
        assert names["backward of loss"] == []
        *gathers, last = names["loss"]
        assert (set(gathers), last) == ({"all_gather"}, "all_reduce")
        assert len(gathers) == 2 + evaluations(lengths, chunk)
        # The gradient of the hidden states, in fp32: a row for each live token.
        assert found["loss"][-1][1] == count * case.hidden.shape[-1] * 4


def test_bounds_are_those_of_dtensor() -> None:
    assert bounds(25, 3) == [0, 9, 18, 25]
    assert bounds(4, 3) == [0, 2, 4, 4]
