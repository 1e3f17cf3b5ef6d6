"""Words of ranks to each other: what they hear, and what they do when one of them fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from collectives import error_of
from torch import distributed
from worlds import Worlds

from steppo_kernels.ranks import Call, Ranks


def different_facts(rank: int, size: int) -> str:
    def run() -> None:
        with Call("loss", "tp_group", Ranks.of("tp_group", None)) as call:
            call.agree({"chunk_tokens": 64 if rank != 1 else 128, "dtype": "fp32"})

    return error_of(run)


def fail_before(rank: int, size: int) -> str:
    def run() -> None:
        with Call("loss", "tp_group", Ranks.of("tp_group", None)) as call:
            if rank == size - 1:
                raise TypeError("hidden: wrong")
            call.agree({})

    return error_of(run)


def fail_between(rank: int, size: int, words: int, at: int | None) -> tuple[str, list[Any]]:
    heard = []

    def run() -> None:
        with Call("loss", "tp_group", Ranks.of("tp_group", None)) as call:
            call.agree({})
            call.open(4, 2, torch.device("cpu"))
            for word in range(words):
                if rank == 0 and word == at:
                    raise MemoryError("full")
                part = torch.full((word % 4 + 1, 2), 10.0 * rank + word, dtype=torch.float64)
                heard.append(call.gather(part)[:, 0, 0].tolist())
            if rank == 0 and at == words:
                raise MemoryError("full")
            call.finish()

    return error_of(run), heard


def with_a_last_word(rank: int, size: int) -> list[float]:
    with Call("loss", "tp_group", Ranks.of("tp_group", None)) as call:
        call.agree({})
        call.open(1, 1, torch.device("cpu"))
        heard = call.gather(torch.full((1, 1), float(rank), dtype=torch.float64), last=True)
        if rank == 0:
            # Nobody listens to what fails from here on.
            call.__exit__(ValueError, ValueError(), None)
    return heard.flatten().tolist()


def interrupted(rank: int, size: int, at: str) -> str:
    """Ctrl-C on one rank; and a rank that has no memory for its word."""

    def run() -> None:
        with Call("loss", "tp_group", Ranks.of("tp_group", None)) as call:
            if rank == 0 and at == "checks":
                raise KeyboardInterrupt
            call.agree({})
            zeros = torch.zeros
            if rank == 0 and at == "memory":
                torch.zeros = without_memory
            try:
                call.open(2, 1, torch.device("cpu"))
            finally:
                torch.zeros = zeros
            if rank == 0 and at == "words":
                raise KeyboardInterrupt
            call.gather(torch.zeros(1, 1, dtype=torch.float64))
            call.finish()

    try:
        found = error_of(run)
    except KeyboardInterrupt:
        found = "KeyboardInterrupt"
    assert with_a_last_word(rank, size) == [0.0, 1.0]
    return found


def without_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("full")


def ways_apart(rank: int, size: int, way: str) -> str:
    def run() -> None:
        with Call("loss", "tp_group", Ranks.of("tp_group", None)) as call:
            call.agree({})
            call.open(4, 2, torch.device("cpu"))
            if way == "number":
                call.finish(number=rank)
            elif way == "rows":
                call.gather(torch.zeros(rank + 1, 2, dtype=torch.float64))
            elif rank == 0:
                call.finish(number=2)
            else:
                call.gather(torch.zeros(2, 2, dtype=torch.float64))

    return error_of(run)


def two_fail(rank: int, size: int) -> str:
    def run() -> None:
        with Call("loss", "tp_group", Ranks.of("tp_group", None)) as call:
            if rank != 1:
                raise ValueError(f"of rank {rank}")
            call.agree({})

    return error_of(run)


def wrong_groups(rank: int, size: int) -> list[str]:
    alone = distributed.new_group([0])
    mesh = distributed.init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "tp"))
    assert Ranks.of("tp_group", mesh["tp"])[1:] == (rank, size)
    found = [error_of(lambda: Ranks.of("tp_group", 7))]
    found.append(error_of(lambda: Ranks.of("tp_group", mesh)))
    if rank > 0:
        found.append(error_of(lambda: Ranks.of("tp_group", alone)))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_difference_is_told_to_all(worlds: Worlds, size: int) -> None:
    others = "0" if size == 2 else "s 0, 2"
    wanted = (
        "ValueError: tp_group: its ranks got different arguments, expected the same: chunk_tokens "
        f"is 64 on rank{others}, 128 on rank 1"
    )
    assert worlds.run(size, different_facts) == [wanted.replace("rank0", "rank 0")] * size


def test_failure_before_the_first_word(worlds: Worlds) -> None:
    *others, own = worlds.run(3, fail_before)
    assert own == "TypeError: hidden: wrong"
    wanted = (
        "RuntimeError: loss: rank 2 of tp_group raised TypeError: hidden: wrong (expected none)"
    )
    assert others == [wanted] * 2


@pytest.mark.parametrize("at", [0, 2, 3])
def test_failure_between_words_leaves_a_group_that_works(worlds: Worlds, at: int) -> None:
    (own, _), *others = worlds.run(3, fail_between, 3, at)
    assert own == "MemoryError: full"
    for error, heard in others:
        assert "rank 0 of tp_group raised an error in it" in error
        assert len(heard) == at
    for error, heard in worlds.run(3, fail_between, 3, None):
        assert error == ""
        assert heard == [[0.0, 10.0, 20.0], [1.0, 11.0, 21.0], [2.0, 12.0, 22.0]]


def test_a_last_word_ends_the_call(worlds: Worlds) -> None:
    assert worlds.run(2, with_a_last_word) == [[0.0, 1.0]] * 2


@pytest.mark.parametrize("at", ["checks", "memory", "words"])
def test_interrupts_and_no_memory_are_told(worlds: Worlds, at: str) -> None:
    own, other = worlds.run(2, interrupted, at)
    assert own == ("OutOfMemoryError: full" if at == "memory" else "KeyboardInterrupt")
    assert "rank 0 of tp_group raised" in other


@pytest.mark.parametrize("way", ["number", "rows", "kind"])
def test_ranks_that_went_different_ways(worlds: Worlds, way: str) -> None:
    assert all("went different ways" in error for error in worlds.run(2, ways_apart, way))


def test_the_first_of_two_failures_is_told(worlds: Worlds) -> None:
    other = worlds.run(3, two_fail)[1]
    assert "ranks 0, 2 of tp_group raised ValueError: of rank 0 (expected none)" in other


def test_groups_that_are_none(worlds: Worlds) -> None:
    first, second = worlds.run(2, wrong_groups)
    assert first[0] == "TypeError: tp_group: got int, expected a ProcessGroup or a DeviceMesh"
    assert first[1].startswith("ValueError: tp_group: got a DeviceMesh of 2 dimensions")
    assert second[2].startswith("ValueError: tp_group: got a group without this rank")


def test_group_without_torch_distributed() -> None:
    with pytest.raises(RuntimeError, match=r"^tp_group: got str without torch\.distributed"):
        Ranks.of("tp_group", "tp")
