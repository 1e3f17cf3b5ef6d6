"""Counts what a rank says to the others, and draws who has what."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, distributed

_NAMES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
)


class Said:
    """The collectives of a block: their names, and the bytes that this rank gave."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.bytes: list[int] = []

    def words(self) -> list[tuple[str, int]]:
        """Return each collective with its bytes."""
        return list(zip(self.names, self.bytes, strict=True))


@contextmanager
def counted() -> Iterator[Said]:
    """Count the collectives of torch.distributed that are called in the block."""
    said = Said()

    def counting(name: str) -> Callable[..., Any]:
        run = getattr(distributed, name)

        def call(*args: Any, **options: Any) -> Any:
            said.names.append(name)
            given = args[1] if name == "all_gather" else args[0] if args else None
            said.bytes.append(given.nbytes if isinstance(given, Tensor) else 0)
            return run(*args, **options)

        return call

    with mock.patch.multiple(distributed, **{name: counting(name) for name in _NAMES}):
        yield said


def error_of(run: Callable[[], Any]) -> str:
    """Return the kind and the text of the error that a call ends in; "" if in none."""
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def parted(rows: int, ranks: int, seed: int) -> list[list[list[int]]]:
    """Draw the rows of each micro-batch of each rank: shuffled, uneven; some have none."""
    draw = random.Random(seed)
    order = draw.sample(range(rows), rows)
    found: list[list[list[int]]] = [[[] for _ in range(draw.randint(0, 3))] for _ in range(ranks)]
    # One has a micro-batch at least.
    if not any(found):
        found[draw.randrange(ranks)] = [[]]
    parts = [part for own in found for part in own]
    for row in order:
        draw.choice(parts).append(row)
    return found
