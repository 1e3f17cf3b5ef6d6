"""What the functions of this folder have in common: numbers as words, and arguments in lists."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, Literal, TypeVar

from torch import Tensor

from ..config import one_of
from ..ranks import Ranks

# What later becomes of the gradients of ranks: DDP and FSDP average them.
Gradients = Literal["mean", "sum"]
_GRADIENTS = ("mean", "sum")

_T = TypeVar("_T")


def value_of(argument: object) -> object:
    """Return what ranks must have in common of an argument, equal where it means the same.

    Of a tensor that is dtype and shape. Numbers are compared by value: 3 is 3.0.
    """
    if isinstance(argument, Tensor):
        return argument.dtype, tuple(argument.shape)
    if isinstance(argument, tuple):
        return tuple(map(value_of, argument))
    if isinstance(argument, Real) and not isinstance(argument, bool):
        try:
            # Of 0 there are two, which are equal.
            return float(argument) + 0.0
        except OverflowError:
            return argument
    return argument


def bits_of(numbers: Sequence[float]) -> tuple[int, ...]:
    """Return the bits of fp64 numbers as integers of 64 bits."""
    return struct.unpack(f"<{len(numbers)}q", struct.pack(f"<{len(numbers)}d", *numbers))


def numbers_of(bits: Sequence[int]) -> tuple[float, ...]:
    """Return the fp64 numbers with these bits."""
    return struct.unpack(f"<{len(bits)}d", struct.pack(f"<{len(bits)}q", *bits))


def divisor(gradients: object, ranks: Ranks) -> int:
    """Return what the gradients of the ranks are divided by later."""
    one_of("gradients", gradients, _GRADIENTS)
    return ranks.size if gradients == "mean" else 1


def listed(name: str, value: object, kind: type[_T]) -> list[_T]:
    """Return one object of a kind, or several in a list, as a list.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(value, kind):
        return [value]
    is_list = isinstance(value, Iterable) and not isinstance(value, (str, bytes))
    entries: list[Any] = list(value) if is_list else [value]  # type: ignore[call-overload]
    for entry in entries:
        if not isinstance(entry, kind):
            raise TypeError(
                f"{name}: got {type(entry).__name__}, expected {kind.__name__} or a list of it"
            )
    return entries


def as_many(name: str, entries: Sequence[object], wanted: int) -> None:
    """Check that a list has one entry per layout."""
    if len(entries) != wanted:
        raise ValueError(f"{name}: got {len(entries)}, expected {wanted}, one per layout")
