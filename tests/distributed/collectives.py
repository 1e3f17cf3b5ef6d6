"""Collectives, as a test counts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, distributed

_NAMES = ("all_gather", "all_reduce", "all_gather_object", "reduce_scatter", "broadcast", "barrier")


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Note each collective that this rank takes part in, and the bytes that it gives to it."""
    found: list[tuple[str, int]] = []
    originals = {name: getattr(distributed, name) for name in _NAMES}

    def noting(name: str) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            given = args[1] if name == "all_gather" else args[0]
            found.append((name, given.nbytes if isinstance(given, Tensor) else 0))
            return originals[name](*args, **options)

        return run

    for name in _NAMES:
        setattr(distributed, name, noting(name))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(distributed, name, original)
