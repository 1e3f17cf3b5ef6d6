"""A head whose vocabulary is split over ranks gives what one process gives with all of it.

All ranks have the same bits of log-probs, losses, metrics and gradients of hidden states; their
gradients of the head are the rows of the whole one.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from batches import Error
from head_cases import head_case
from head_regimes import REGIMES, draw, evaluate, typed
from heads import HEADS, OBJECTIVES, Task, alone, bounds, found_in, on_ranks, shard_of
from targets import Target
from torch import Tensor, distributed
from worlds import Worlds

# Of a head, so of different sizes on the ranks; of 4 ids, the last of 3 ranks has none.
_VOCABULARIES = (25, 26, 7, 4)
_SHARDED = ("grad_weight", "grad_bias")


# Of what is compared with the largest: what rounding inputs and gradients of a dtype may do. Halves
# are held to the error of plain PyTorch below.
_ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
}


def tasks_of(target: Target) -> list[Task]:
    """Every objective, head and vocabulary; fewer of them where kernels are emulated."""
    found = []
    for number, (vocabulary, head) in enumerate(product(_VOCABULARIES, HEADS)):
        drawn = {"seed": 3 + vocabulary, "vocabulary": vocabulary}
        if target.interpreted:
            drawn |= {"rows": 1, "length": 13}
        for dtype in _ROUNDING:
            # The interpreter of Triton drops bits of bf16, and takes its time.
            if target.interpreted and (dtype.itemsize == 2 or number % 2):
                continue
            found.append(Task(drawn, dtype, target.backend, "log-probs", head=head))
            for place, objective in enumerate(OBJECTIVES):
                is_turn = (number + place) % len(OBJECTIVES) == 0
                if is_turn or (not target.emulated and dtype.itemsize > 2):
                    found.append(Task(drawn, dtype, target.backend, "loss", objective, head))
    return found


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits, NaN being any NaN."""
    return a.shape == b.shape and torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25))


def put_together(answers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return what all ranks found; what each has whole is the same on all of them."""
    for name, value in answers[0].items():
        if name not in _SHARDED:
            assert all(is_same(value, other[name]) for other in answers[1:]), name
    rows = {n: torch.cat([one[n] for one in answers]) for n in _SHARDED if n in answers[0]}
    return answers[0] | rows


@pytest.mark.parametrize("size", [2, 3])
def test_shards_give_what_the_whole_gives(target: Target, worlds: Worlds, size: int) -> None:
    tasks = tasks_of(target)
    for task, *answers in zip(tasks, *worlds.run(size, on_ranks, tasks), strict=True):
        found = put_together([one for one, _ in answers])
        exact = alone(task._replace(dtype=torch.float64, backend="reference"))
        plain = alone(task._replace(backend="reference"))
        for name, value in found.items():
            assert value.dtype == plain[name].dtype, (task, name)
            assert bool((value.isnan() == plain[name].isnan()).all()), (task, name)
            error, allowed = (
                Error.between(one.nan_to_num(), exact[name].nan_to_num()).largest
                for one in (value, plain[name])
            )
            assert error <= 4 * allowed + _ROUNDING[task.dtype], (task, name, error, allowed)


_SEEDS = range(6)
_WAYS = (("one call", None), ("one call", 5), ("two calls", 5))


def regimes_on_ranks(
    rank: int, size: int, name: str, dtype: torch.dtype, backend: str
) -> list[dict[str, Tensor]]:
    regime, found = REGIMES[name], []
    for seed in _SEEDS:
        way, chunk = _WAYS[seed % len(_WAYS)]
        case = shard_of(typed(draw(regime, seed, dtype), dtype, "cpu"), rank, size)
        group = {"tp_group": distributed.group.WORLD}
        found.append(evaluate(case, regime, way, backend, chunk, **group))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in REGIMES if not name.startswith("large")])
def test_error_is_bounded_by_that_of_plain_pytorch(
    worlds: Worlds, name: str, dtype: torch.dtype
) -> None:
    """Root mean squares over the seeds; losses from log-probs have these beside their gradients."""
    regime = REGIMES[name]
    squares: dict[tuple[str, str], list[float]] = {}
    for seed, *answers in zip(
        _SEEDS, *worlds.run(2, regimes_on_ranks, name, dtype, "cpu"), strict=True
    ):
        found = put_together(answers)
        case = draw(regime, seed, dtype)
        exact = evaluate(typed(case, torch.float64, "cpu"), regime, "plain", "reference", None)
        plain = evaluate(typed(case, dtype, "cpu"), regime, "plain", "reference", None)
        for key, value in found.items():
            for who, got in (("shards", value), ("plain", plain[key])):
                error = Error.between(got, exact[key]).rms
                squares.setdefault((who, key), []).append(error**2)
    factor = 2.0 if dtype == torch.float32 else 1.0
    for key, value in found.items():
        error, allowed = (
            math.sqrt(sum(squares[who, key]) / len(squares[who, key]))
            for who in ("shards", "plain")
        )
        # A loss is one number, in which terms of both signs meet: chance has a say.
        rounding = (64 if key == "loss" else 1) * torch.finfo(value.dtype).eps
        assert error <= factor * allowed + rounding, (key, error, allowed)


def summed_on_ranks(rank: int, size: int, backend: str) -> list[Tensor]:
    found = []
    for seed in range(4):
        case = shard_of(head_case(seed, 2, 16, 64, 40).to(torch.bfloat16), rank, size)
        task = Task({}, torch.bfloat16, backend, "log-probs", wanted=("hidden",))
        found.append(found_in(task, case, tp_group=distributed.group.WORLD)["grad_hidden"])
    return found


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_ranks_add_up_is_rounded_once(worlds: Worlds, backend: str) -> None:
    """As one process errs. With parts that were rounded, or a sum in bf16, it is much more."""
    squares = [0.0, 0.0]
    for seed, *answers in zip(range(4), *worlds.run(3, summed_on_ranks, backend), strict=True):
        grads = []
        for dtype in (torch.float64, torch.bfloat16):
            case = head_case(seed, 2, 16, 64, 40).to(torch.bfloat16).to(dtype)
            own = "reference" if dtype == torch.float64 else backend
            task = Task({}, dtype, own, "log-probs", wanted=("hidden",))
            grads.append(found_in(task, case)["grad_hidden"])
        exact, plain = grads
        for place, value in enumerate((answers[0], plain)):
            error = Error.between(value.nan_to_num(), exact.nan_to_num()).rms
            squares[place] += error**2
    assert squares[0] ** 0.5 <= 1.15 * squares[1] ** 0.5


def repeated(rank: int, size: int, tasks: list[Task]) -> bool:
    first, second = on_ranks(rank, size, tasks), on_ranks(rank, size, tasks)
    return all(
        is_same(a[name], b[name])
        for (a, _), (b, _) in zip(first, second, strict=True)
        for name in a
    )


def test_two_runs_have_the_same_bits(target: Target, worlds: Worlds) -> None:
    drawn = {"seed": 5, "rows": 2, "vocabulary": 26}
    tasks = [
        Task(drawn, torch.float32, target.backend, what, "all terms", "all options")
        for what in ("loss", "log-probs")
    ]
    assert all(worlds.run(2, repeated, tasks))


@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ()], ids=str)
def test_only_the_gradients_that_are_wanted(
    target: Target, worlds: Worlds, wanted: tuple[str, ...]
) -> None:
    drawn = {"seed": 8, "rows": 2, "vocabulary": 7}
    tasks = [
        Task(drawn, torch.float64, target.backend, what, head="all options", wanted=wanted)
        for what in ("loss", "log-probs")
    ]
    for task, *answers in zip(tasks, *worlds.run(3, on_ranks, tasks), strict=True):
        found = put_together([one for one, _ in answers])
        for name, value in alone(task._replace(backend="reference")).items():
            assert Error.between(found[name].nan_to_num(), value.nan_to_num()).largest < 1e-12, name
        # Without hidden states to train, nothing is added up.
        sums = [name for name, _ in answers[0][1] if name == "all_reduce"]
        assert len(sums) == ("hidden" in wanted)


def odd_batches(rank: int, size: int, backend: str) -> list[dict[str, Tensor]]:
    """No action token, one, steps of one, a mask instead of a layout, a strided weight."""
    from steppo_kernels import StepLayout, linear_steppo_loss

    group, found = distributed.group.WORLD, []
    for mask in ([[0, 0, 0]], [[0, 1, 0]], [[1, 0, 1]], [[]]):
        action = torch.tensor(mask, dtype=torch.bool)
        for given in (StepLayout.from_mask(action, backend=backend), action):
            case = shard_of(head_case(2, 1, action.shape[1], 5, 7).to(torch.float64), rank, size)
            weight = case.weight.detach().t().contiguous().t().requires_grad_()
            # What one process is given on all ranks.
            if size == 1:
                group = None
            out = linear_steppo_loss(
                case.hidden.detach().nan_to_num(0.5).requires_grad_(),
                weight,
                case.token_ids.clamp(0, 6),
                None,
                torch.ones_like(action, dtype=torch.float64),
                given,
                tp_group=group,
                backend=backend,
            )
            out.loss.backward()
            found.append({"loss": out.loss.detach(), "grad_weight": weight.grad})
    return found


def test_odd_batches(target: Target, worlds: Worlds) -> None:
    wanted = odd_batches(0, 1, "reference")
    for exact, *answers in zip(wanted, *worlds.run(3, odd_batches, target.backend), strict=True):
        found = put_together(answers)
        for name, value in exact.items():
            assert Error.between(found[name], value).largest < 1e-12, name


def ruled_out(rank: int, size: int, backend: str, whole: bool) -> dict[str, Tensor]:
    """Ids of probability 0, all those of a rank among them, and logits around 1e30."""
    from steppo_kernels import linear_token_log_probs

    bias = torch.zeros(9, dtype=torch.float64)
    bias[3:6] = -math.inf
    bias[8] = -math.inf
    hidden = torch.tensor([[0.0], [1.0], [1e30], [-1e30]], dtype=torch.float64, requires_grad=True)
    weight = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    ids = torch.tensor([0, 7, 7, 0])
    ends = [0, 9] if whole else bounds(9, size)
    rows = slice(ends[rank], ends[rank + 1])
    weight, bias = weight[rows].clone().requires_grad_(), bias[rows].clone().requires_grad_()
    log_probs, entropy = linear_token_log_probs(
        hidden,
        weight,
        ids,
        bias=bias,
        return_entropy=True,
        tp_group=None if whole else distributed.group.WORLD,
        backend=backend,
    )
    (log_probs.sum() - entropy.sum()).backward()
    assert hidden.grad is not None
    found = {"log_probs": log_probs.detach(), "entropy": entropy.detach()}
    return found | {
        "grad_hidden": hidden.grad,
        "grad_weight": weight.grad,
        "grad_bias": bias.grad,
    }


def test_ids_that_are_ruled_out(target: Target, worlds: Worlds) -> None:
    exact = ruled_out(0, 1, "reference", True)
    found = put_together(worlds.run(3, ruled_out, target.backend, False))
    for name, value in exact.items():
        assert bool(value.isfinite().all())
        assert Error.between(found[name], value).largest < 1e-12, name


def drawn_tasks(seed: int, count: int) -> list[Task]:
    random = torch.Generator().manual_seed(seed)

    def pick(values: Any) -> Any:
        return list(values)[int(torch.randint(len(list(values)), (), generator=random))]

    tasks = []
    for number in range(count):
        drawn = {
            "seed": 100 * seed + number,
            "rows": pick(range(1, 4)),
            "length": pick(range(1, 20)),
            "size": pick(range(1, 7)),
            "vocabulary": pick(range(2, 40)),
            "mean_step": pick((1.0, 4.0, 30.0)),
            "sharp": pick((1.0, 8.0, 60.0)),
            "moved": pick((0.0, 0.1, 2.0)),
        }
        what = pick(("loss", "log-probs"))
        tasks.append(Task(drawn, torch.float64, "cpu", what, pick(OBJECTIVES), pick(HEADS)))
    return tasks


@pytest.mark.parametrize("size", [2, 3])
def test_compositions_that_are_drawn(worlds: Worlds, size: int) -> None:
    tasks = drawn_tasks(size, 150)
    for task, *answers in zip(tasks, *worlds.run(size, on_ranks, tasks), strict=True):
        found = put_together([one for one, _ in answers])
        exact = alone(task._replace(backend="reference"))
        for name, value in exact.items():
            torch.testing.assert_close(
                found[name],
                value,
                rtol=1e-9,
                atol=1e-9,
                equal_nan=True,
                msg=lambda text, at=(task, name): f"{at}: {text}",
            )
