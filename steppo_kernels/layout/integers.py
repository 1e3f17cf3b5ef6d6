"""Checks of integers that a caller keeps outside of tensors: in sequences, in arrays, alone."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks

_INT64 = torch.iinfo(torch.int64)


def vector(name: str, value: Tensor | Sequence[int]) -> Tensor:
    """Return an integer tensor, or a sequence or array of integers as one."""
    if isinstance(value, Tensor):
        return checks.integer(name, value)
    entries = sequence(name, value, "integers")
    try:
        made = torch.tensor(entries, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        # Objects that are integers, such as those of an object array; or the error tells which not.
        made = torch.tensor([index(name, one) for one in entries], dtype=torch.int64, device="cpu")
    return checks.integer(name, made) if made.numel() else made.to(torch.int64)


def sequence(name: str, value: object, expected: str) -> list[Any]:
    """Return the entries of a sequence, an array or an iterator; of nothing without an order."""
    unordered = isinstance(value, (str, bytes, set, frozenset, dict))
    if unordered or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        raise TypeError(f"{name}: got {type(value).__name__}, expected {expected} in a sequence")
    return list(value)


def index(name: str, value: object, also: str = "") -> int:
    """Return an integer of any type, within int64 (any size if `also` names other types)."""
    expected = f"integers {also}".strip()
    if _is_flag(value) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: got an entry of type {type(value).__name__}, expected {expected}")
    try:
        found = operator.index(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: got an entry of type {type(value).__name__}, expected {expected}"
        ) from error
    if not also and not _INT64.min <= found <= _INT64.max:
        raise ValueError(f"{name}: got {found}, expected integers of 64 bits")
    return found


def token_id(name: str, value: object) -> int:
    """Return one token id, an integer of any type."""
    if _is_flag(value) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: got {type(value).__name__}, expected token ids")
    return index(name, value)


def _is_flag(value: object) -> bool:
    """Return whether a value is a bool of Python, torch or numpy; some count as integers."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
