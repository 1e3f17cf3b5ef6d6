"""The token sequences around actions, as a caller gives them and as the operator takes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from . import integers


class Markers(NamedTuple):
    """Arguments of the operator `mark_actions`, int64 on one device.

    Attributes:
        starts, start_offsets: sequences that open an action, end to end, and ``[n + 1]`` where they
            begin.
        ends: tokens that close an action.
        stops, stop_offsets: sequences that close an action before them; there may be none.
    """

    starts: Tensor
    start_offsets: Tensor
    ends: Tensor
    stops: Tensor
    stop_offsets: Tensor

    @classmethod
    def of(cls, start: Any, end: Any, stop: Any, device: torch.device) -> Markers:
        """Return the checked markers on `device`."""
        starts = _sequences("start", start)
        stops = [] if stop is None else _sequences("stop", stop)
        ids = token_set("end", end)
        if not ids and not stops:
            raise ValueError("end: got an empty sequence, expected at least one token id")
        made = (*_ragged(starts), torch.tensor(ids, dtype=torch.int64, device="cpu"))
        return cls(*(tensor.to(device) for tensor in (*made, *_ragged(stops))))


def token_set(name: str, value: object) -> list[int]:
    """Return one token id, or several, as a list."""
    if isinstance(value, Tensor):
        value = checks.tensor(name, value)
    entries = [value] if _is_one(value) else _entries(name, value)
    return [integers.token_id(name, one) for one in entries]


def _sequences(name: str, value: object) -> list[list[int]]:
    """Return one sequence of token ids, or several, as a list of lists."""
    if isinstance(value, Tensor):
        value = checks.tensor(name, value)
        checks.dims(name, value, (0, 1))
    if _is_one(value):
        return [[integers.token_id(name, value)]]
    entries = _entries(name, value)
    if entries and not any(map(_is_one, entries)):
        several = [
            [integers.token_id(name, one) for one in _entries(name, entry)] for entry in entries
        ]
    else:
        several = [[integers.token_id(name, one) for one in entries]]
    if not all(several):
        raise ValueError(f"{name}: got an empty sequence, expected at least one token id")
    return several


def _is_one(value: object) -> bool:
    """Whether a value is a single entry: neither a sequence nor an array of one."""
    dimensions = getattr(value, "ndim", None)
    if dimensions is not None:
        return bool(dimensions == 0)
    return isinstance(value, str) or not isinstance(value, Iterable)


def _entries(name: str, value: object) -> list[object]:
    """Return the entries of a sequence, of a vector or of an array."""
    if isinstance(value, Tensor):
        whole = checks.dims(name, checks.integer(name, value), (1,))
        return list(whole.tolist())
    return integers.sequence(name, value, "token ids")


def _ragged(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return sequences end to end, and where they begin."""
    flat = [one for sequence in sequences for one in sequence]
    offsets = [0]
    for sequence in sequences:
        offsets.append(offsets[-1] + len(sequence))
    return (
        torch.tensor(flat, dtype=torch.int64, device="cpu"),
        torch.tensor(offsets, dtype=torch.int64, device="cpu"),
    )
