"""Ranks that share a head fail together: none waits, and the group can be used again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from collectives import error_of
from head_cases import head_case
from heads import DRAWN, log_probs_of, shard_of, works
from targets import Target
from torch import distributed
from worlds import Worlds

from steppo_kernels import (
    StepLayout,
    StepPOConfig,
    linear_steppo_loss,
)
from steppo_kernels.backends import operators


def bad_ids(rank: int, size: int, backend: str) -> list[str]:
    """An id beyond the vocabulary, on one rank and on all."""
    found = []
    for ranks in ([0], range(size)):
        case = shard_of(head_case(**DRAWN).to(torch.float64), rank, size)
        if rank in ranks:
            case.token_ids[case.mask] = 7
        found.append(error_of(lambda: log_probs_of(case, backend=backend)))  # noqa: B023
    assert works(rank, size)
    return found


def test_ids_out_of_range(target: Target, worlds: Worlds) -> None:
    own = "ValueError: token_ids: got 7, expected ids from 0 to 6"
    first, second = worlds.run(2, bad_ids, target.backend)
    assert first == [own, own]
    assert "rank 0 of tp_group raised an error in it" in second[0]
    assert second[1] == own


def fail_at(rank: int, size: int, name: str, number: int, what: str) -> str:
    """One rank is out of memory in the call `number` of an operator."""
    case = shard_of(head_case(**DRAWN).to(torch.float64), rank, size)
    original, seen = operators.call, [0]

    def failing(called: str, *args: Any) -> Any:
        seen[0] += called == name
        if rank == size - 1 and called == name and seen[0] == number:
            raise torch.OutOfMemoryError("out of memory")
        return original(called, *args)

    def run() -> None:
        options = {"chunk_tokens": 5, "tp_group": distributed.group.WORLD}
        if what == "loss":
            linear_steppo_loss(
                case.hidden,
                case.weight,
                case.token_ids,
                case.old_log_probs,
                case.advantages,
                case.layout,
                config=StepPOConfig(clip_low=0.9, clip_high=9.0),
                **options,
            )
        else:
            log_probs_of(case, **options).sum().backward()

    operators.call = failing
    try:
        found = error_of(run)
    finally:
        operators.call = original
    assert works(rank, size)
    assert seen[0] >= number or rank < size - 1, "it did not come so far"
    return found


@pytest.mark.parametrize("what", ["loss", "log-probs"])
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("head_logits", 1),
        ("head_logits", 2),
        ("token_log_probs", 3),
        ("order_live_rows", 1),
        ("token_log_probs_backward", 1),
        ("token_log_probs_backward", 2),
    ],
)
def test_a_rank_that_fails_leaves_none_waiting(
    worlds: Worlds, what: str, name: str, number: int
) -> None:
    *others, own = worlds.run(3, fail_at, name, number, what)
    assert own == "OutOfMemoryError: out of memory"
    for error in others:
        assert error.startswith("RuntimeError: linear_")
        assert "rank 2 of tp_group raised" in error


def without_memory(rank: int, size: int, what: str) -> str:
    """One rank has no memory for its gradients, after all have said what they were given."""
    from steppo_kernels.log_probs import lm_head

    case = shard_of(head_case(**DRAWN).to(torch.float64), rank, size)
    original = lm_head.weight_gradient

    def failing(*args: Any, **options: Any) -> Any:
        if rank == 0:
            raise torch.OutOfMemoryError("out of memory")
        return original(*args, **options)

    def run() -> None:
        if what == "loss":
            given = case.hidden, case.weight, case.token_ids
            objective = case.old_log_probs, case.advantages, case.layout
            linear_steppo_loss(*given, *objective, tp_group=distributed.group.WORLD)
        else:
            log_probs_of(case).sum().backward()

    lm_head.weight_gradient = failing
    try:
        found = error_of(run)
    finally:
        lm_head.weight_gradient = original
    assert works(rank, size)
    return found


@pytest.mark.parametrize("what", ["loss", "log-probs"])
def test_a_rank_without_memory_for_its_gradients(worlds: Worlds, what: str) -> None:
    own, other = worlds.run(2, without_memory, what)
    assert own == "OutOfMemoryError: out of memory"
    assert "rank 0 of tp_group raised an error in it" in other


def changed_in_place(rank: int, size: int) -> str:
    """Autograd refuses a weight that one rank has changed since the forward pass."""
    case = shard_of(head_case(**DRAWN).to(torch.float64), rank, size)
    log_probs = log_probs_of(case)
    if rank == 0:
        case.weight.data.add_(0)
        with torch.no_grad():
            case.weight.add_(1)
    found = error_of(lambda: log_probs.sum().backward())
    assert works(rank, size)
    return found


def test_a_weight_that_one_rank_changed(worlds: Worlds) -> None:
    own, other = worlds.run(2, changed_in_place)
    assert "modified by an inplace operation" in own
    assert "rank 0 of tp_group raised" in other


def fail_after_the_last_chunk(rank: int, size: int, what: str, kind: str) -> str:
    """What ranks told each other in their last chunk is combined, and one of them fails at it."""
    from steppo_kernels.log_probs import vocabulary_shard

    case = shard_of(head_case(**DRAWN).to(torch.float64), rank, size)
    original, seen = vocabulary_shard.combined, [0]
    chunks = -(-case.layout.num_tokens // 5)

    def failing(*args: Any) -> Any:
        seen[0] += 1
        if rank == 1 and seen[0] == chunks:
            raise {"error": ValueError, "interrupt": KeyboardInterrupt}[kind]("of this test")
        return original(*args)

    def run() -> None:
        if what == "loss":
            given = case.hidden, case.weight, case.token_ids
            every = case.layout.per_token()
            options = {"tp_group": distributed.group.WORLD, "chunk_tokens": 5}
            linear_steppo_loss(*given, None, torch.ones(every.num_steps), every, **options)
        else:
            log_probs_of(case, chunk_tokens=5)

    vocabulary_shard.combined = failing
    try:
        found = error_of(run)
    except KeyboardInterrupt:
        found = "KeyboardInterrupt"
    finally:
        vocabulary_shard.combined = original
    assert works(rank, size)
    assert seen[0] == chunks
    return found


@pytest.mark.parametrize("kind", ["error", "interrupt"])
@pytest.mark.parametrize("what", ["loss", "log-probs"])
def test_a_rank_that_fails_after_the_last_chunk(worlds: Worlds, what: str, kind: str) -> None:
    other, own = worlds.run(2, fail_after_the_last_chunk, what, kind)
    assert own == {"error": "ValueError: of this test", "interrupt": "KeyboardInterrupt"}[kind]
    assert "rank 1 of tp_group raised an error in it" in other


def other_upstream(rank: int, size: int) -> str:
    """Ranks whose losses differ have other rows with a gradient."""
    case = shard_of(head_case(**DRAWN).to(torch.float64), rank, size)
    log_probs = log_probs_of(case)
    part = log_probs[:, :5] if rank == 0 else log_probs
    found = error_of(lambda: part.sum().backward())
    assert works(rank, size)
    return found


def test_ranks_with_other_losses_raise(worlds: Worlds) -> None:
    for error in worlds.run(2, other_upstream):
        assert "rows with a gradient is " in error


def other_function(rank: int, size: int) -> str:
    case = shard_of(head_case(**DRAWN).to(torch.float64), rank, size)
    layout = StepLayout.from_mask(case.mask)
    group = {"tp_group": distributed.group.WORLD}
    given = case.hidden, case.weight, case.token_ids

    def loss() -> Any:
        return linear_steppo_loss(*given, None, case.advantages, layout, **group)

    found = error_of(loss if rank == 0 else lambda: log_probs_of(case))
    assert works(rank, size)
    return found


def test_ranks_that_call_different_functions_raise(worlds: Worlds) -> None:
    for error in worlds.run(2, other_function):
        assert "function is linear_steppo_loss on rank 0, linear_token_log_probs on rank 1" in error
