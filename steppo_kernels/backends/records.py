"""The tensors of a layout that operators take together, each in a record of its own.

In a schema a record is a ``Tensor[]``. Compiled launchers turn it into a struct of
csrc/include/steppo/records.inc: addresses, and sizes behind them. A layout holds its records, whose
memory nobody else sees, so that this is done once for a layout and not once for a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Record = TypeVar("Record", bound="tuple[Tensor, ...]")
Made = TypeVar("Made")


class kept(Generic[Made]):  # noqa: N801 (a decorator)
    """A property that is made once, like ``functools.cached_property``.

    That one takes a lock before Python 3.12, which `torch.compile` does not trace. A graph makes
    the value anew: what it keeps would be a tensor of the trace.
    """

    def __init__(self, make: Callable[[Any], Made]) -> None:
        self._make = make
        self._name = make.__name__
        self.__doc__ = make.__doc__

    def __get__(self, owner: Any, kind: type | None = None) -> Made:
        made = self._make(owner)
        if not torch.compiler.is_compiling():
            owner.__dict__[self._name] = made
        return made


def template(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor to allocate others like: half the time of naming a size.

    It is kept, and so no mode of torch that is on when it is made has a say in what it is.
    """
    with _disable_current_modes():
        return torch.empty(size, dtype=dtype, device=device)


class _Steps(NamedTuple):
    step_ids: Tensor
    token_index: Tensor
    step_offsets: Tensor
    step_starts: Tensor
    trajectory_counts: Tensor


class Steps(_Steps):
    """Which tokens form which step.

    Attributes:
        step_ids: int32 ``[N]``, -1 where no action token.
        token_index: int64 ``[M]``.
        step_offsets: int64 ``[S + 1]``.
        step_starts: int64 ``[S]``: the first position of a step whose positions follow each other,
            else -1.
        trajectory_counts: int32 ``[S]``.
    """

    @kept
    def num_steps(self) -> int:
        """S."""
        return self.trajectory_counts.shape[0]

    @kept
    def like_steps(self) -> dict[torch.dtype, Tensor]:
        """Tensors ``[S]`` to allocate others like."""
        size, device = (self.num_steps,), self.step_starts.device
        floats = (torch.float32, torch.float64)
        return {dtype: template(size, dtype, device) for dtype in floats}

    @kept
    def fields(self) -> tuple[int, ...]:
        """The record ``Steps`` of the compiled code."""
        sizes = (self.step_ids.numel(), self.token_index.numel(), self.num_steps)
        return _addresses(self) + sizes


class _Timeline(NamedTuple):
    step_ids: Tensor
    step_offsets: Tensor
    step_starts: Tensor
    row_offsets: Tensor
    state_index: Tensor
    trajectory_steps: Tensor
    trajectory_offsets: Tensor


class Timeline(_Timeline):
    """The order of the steps in time, and where their rewards and values lie.

    Attributes:
        step_ids: int32 ``[N]``.
        step_offsets: int64 ``[S + 1]``.
        step_starts: int64 ``[S]``.
        row_offsets: int64 ``[R + 1]``.
        state_index: int64 ``[S]``.
        trajectory_steps: int64 ``[K]``.
        trajectory_offsets: int64 ``[G + 1]``.
    """

    @kept
    def fields(self) -> tuple[int, ...]:
        """The record ``Timeline`` of the compiled code."""
        sizes = (
            self.step_ids.numel(),
            self.row_offsets.numel() - 1,
            self.state_index.numel(),
            self.trajectory_steps.numel(),
            self.trajectory_offsets.numel() - 1,
        )
        return _addresses(self) + sizes


class _States(NamedTuple):
    state_index: Tensor
    step_lengths: Tensor
    trajectory_counts: Tensor


class States(_States):
    """The states before the steps.

    Attributes:
        state_index: int64 ``[S]``.
        step_lengths: int32 ``[S]``.
        trajectory_counts: int32 ``[S]``.
    """

    @kept
    def fields(self) -> tuple[int, ...]:
        """The record ``States`` of the compiled code."""
        return (*_addresses(self), self.state_index.numel())


# The longest rows of a weight whose columns a block or a program of a GPU has in registers.
MOST_ROW_BYTES = 1 << 14


class _Sets(NamedTuple):
    ids: Tensor
    offsets: Tensor


class Sets(_Sets):
    """The ids that each token keeps, and so its pairs of a token and an id.

    Attributes:
        ids: int32 ``[P]``, ascending within a token.
        offsets: int64 ``[N + 1]``: token n has the pairs ``offsets[n]`` to ``offsets[n + 1]``.
    """

    @kept
    def fields(self) -> tuple[int, ...]:
        """The record ``Sets`` of the compiled code."""
        return (*_addresses(self), self.ids.numel(), self.offsets.numel() - 1)


class _IdIndex(NamedTuple):
    ids: Tensor
    pairs: Tensor
    tokens: Tensor
    parts: Tensor
    part_ids: Tensor
    part_slots: Tensor
    long_ids: Tensor
    long_slots: Tensor


class IdIndex(_IdIndex):
    """The pairs in the order of their ids, in parts of a bounded length.

    A part is of one id. Ids with more than one are *long*: each of their parts has a slot for its
    sum.

    Attributes:
        ids: int32 ``[U]``, the ids that some token keeps, ascending.
        pairs: int64 ``[P]``, the pairs by their id and then by their token.
        tokens: int64 ``[P]``, the token of each of these.
        parts: int64 ``[W + 1]``: part w has the entries ``parts[w]`` to ``parts[w + 1]``.
        part_ids: int64 ``[W]``, which of the ids a part belongs to.
        part_slots: int64 ``[W]``, the slot of a part; -1 if it is all that its id has.
        long_ids: int64 ``[X]``, which of the ids are long.
        long_slots: int64 ``[X + 1]``: long id x has the slots ``long_slots[x]`` to
            ``long_slots[x + 1]``.
    """

    @kept
    def num_slots(self) -> int:
        """How many parts long ids have together. A GPU is waited for, once."""
        return int(self.long_slots[-1])

    def new_sums(self, hidden: Tensor) -> Tensor:
        """Return room for the sums of the parts of long ids, fp32 or fp64 ``[num_slots, d + 1]``.

        They are of hidden states ``[N, d]``; the last column is that of the bias.
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return hidden.new_empty((self.num_slots, hidden.shape[1] + 1), dtype=dtype)

    @kept
    def fields(self) -> tuple[int, ...]:
        """The record ``IdIndex`` of the compiled code."""
        sizes = (self.ids, self.pairs, self.part_ids, self.long_ids)
        return (*_addresses(self), *(tensor.numel() for tensor in sizes))


def record(kind: type[Record], tensors: Sequence[Tensor]) -> Record:
    """Return the tensors of a schema as the record that they are; a record is returned itself."""
    return tensors if type(tensors) is kind else kind(*tensors)


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise RuntimeError("a kernel got a tensor that is not contiguous")
    return tuple(tensor.data_ptr() for tensor in tensors)
