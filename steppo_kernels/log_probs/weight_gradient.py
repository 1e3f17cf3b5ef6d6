"""The gradient of the head's weight, dW = dZ' H, summed over chunks of rows.

dZ ``[n, V]`` are gradients of logits, in memory that the next chunk overwrites, and H ``[n, d]``
hidden states. A chunk that is alone is one product. Of more chunks, the products are summed in fp32
or, on a GPU, few rows of half precision are kept for one product in the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from .. import checks
from ..backends import operators
from ..backends.gpu import products
from .memory import gradient

# Adds the product of ``[v, n]`` and ``[n, d]`` to a sum ``[v, d]``, or writes it to that if it is
# the first.
Add = Callable[[Tensor, Tensor, Tensor, bool], None]

# Rows of the weight that are taken at a time where something is copied for each. On a CPU the copy
# stays in a cache until it is used, and fresh memory is not needed for it. On a GPU the copy is
# small next to the logits of a chunk, and its product is large enough for every processor.
CPU_SLICE, GPU_SLICE = 4096, 2**14


class WeightGradient(Protocol):
    """What the products of chunks come together in."""

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Take in ``[n, V]`` gradients, which are overwritten afterwards, and hidden states."""

    def finish(self) -> Tensor:
        """Return ``[V, d]`` in the dtype of the weight or in the wider one of the sum."""


class OneProduct:
    """The product of the only chunk, rounded once to the dtype of the weight."""

    def __init__(self, weight: Tensor, slice_rows: int) -> None:
        """Allocate the gradient, of which `slice_rows` rows are formed at a time."""
        self._total, self._slice = gradient(weight.shape, weight.dtype, weight.device), slice_rows
        self._is_empty = True

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Write the product."""
        assert self._is_empty, "got a second chunk, expected one"
        self._is_empty = False
        for part, columns in _slices(self._total, grad_logits, self._slice):
            torch.mm(columns.t(), hidden, out=part)

    def finish(self) -> Tensor:
        """Return the product, 0 without one."""
        return self._total.zero_() if self._is_empty else self._total


class Sum:
    """A sum in fp32 or wider, to which each product is added as it comes.

    For halves, it is memory besides that of the gradient, read and written for each chunk.
    """

    def __init__(self, weight: Tensor, add: Add, slice_rows: int) -> None:
        """Allocate the sum, of which `slice_rows` rows are added to at a time."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self._total, self._slice = gradient(weight.shape, dtype, weight.device), slice_rows
        self._add, self._is_empty = add, True

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Add a product; of wider `hidden`, it is formed in the dtype of these."""
        is_first, self._is_empty = self._is_empty, False
        for part, columns in _slices(self._total, grad_logits, self._slice):
            self._add(part, columns.t().to(hidden.dtype), hidden, is_first)

    def finish(self) -> Tensor:
        """Return the sum, 0 without products."""
        return self._total.zero_() if self._is_empty else self._total


class KeptRows:
    """Rows that are kept for one product in the end, which is rounded once.

    Few of them take less memory than a sum in fp32, which would also be read and written for each
    chunk. When they are too many, they become the first products of such a sum.
    """

    def __init__(self, weight: Tensor, most_rows: int, make_sum: Callable[[], Sum]) -> None:
        """Begin to keep up to `most_rows` rows."""
        self._weight, self._most_rows, self._make_sum = weight, most_rows, make_sum
        self._grad_logits: list[Tensor] = []
        self._hidden: list[Tensor] = []
        self._sum: Sum | None = None

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Keep a copy of the gradients and the hidden states, or add their product."""
        if self._sum is None:
            if sum(map(len, self._hidden)) + len(hidden) <= self._most_rows:
                self._grad_logits.append(grad_logits.clone(memory_format=torch.contiguous_format))
                self._hidden.append(hidden)
                return
            self._sum = self._make_sum()
            while self._hidden:
                self._sum.add(self._grad_logits.pop(0), self._hidden.pop(0))
        self._sum.add(grad_logits, hidden)

    def finish(self) -> Tensor:
        """Return the product of all rows, or the sum where they were too many."""
        if self._sum is not None:
            return self._sum.finish()
        total = gradient(self._weight.shape, self._weight.dtype, self._weight.device)
        if not self._hidden:
            return total.zero_()
        hidden = torch.cat(self._hidden)
        chunks = [rows.split(GPU_SLICE, dim=1) for rows in self._grad_logits]
        for part, *columns in zip(total.split(GPU_SLICE), *chunks, strict=True):
            torch.mm(torch.cat(columns).t(), hidden, out=part)
        return total


def weight_gradient(
    weight: Tensor, backend: str, num_chunks: int, num_rows: int | None, *, takes_units: bool
) -> WeightGradient:
    """Return how the gradient of a weight is formed.

    There are at most `num_chunks` chunks, and `num_rows` rows in them if that is known yet. With
    `takes_units`, hidden states are given in fp32, multiplied by those units.
    """
    vocabulary, size = weight.shape
    part = slice_rows(weight)
    # Where nothing is copied, a GPU takes the weight as a whole.
    whole = vocabulary if weight.is_cuda else part
    if takes_units:
        return Sum(weight, add_alike, part)
    if num_chunks <= 1:
        return OneProduct(weight, whole)
    if weight.dtype not in checks.HALF_DTYPES:
        return Sum(weight, add_alike, whole)

    def make_sum() -> Sum:
        if weight.is_cuda and products.adds_products(weight.device, weight.dtype):
            return Sum(weight, add_in_fp32, whole)
        return Sum(weight, functools.partial(add_rounded, backend), part)

    # As many rows as this take half of the memory of a sum. They are copied twice, which moves
    # about as much as rounding a sum does.
    most_rows = size
    if not weight.is_cuda or (num_rows is not None and num_rows > most_rows):
        return make_sum()
    return KeptRows(weight, most_rows, make_sum)


def slice_rows(like: Tensor) -> int:
    """Return how many rows of the weight are taken at a time, on the device of a tensor."""
    return GPU_SLICE if like.is_cuda else CPU_SLICE


def _slices(total: Tensor, grad_logits: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows of a weight's gradient, and the columns of gradients that they come from."""
    return zip(total.split(rows), grad_logits.split(rows, dim=1), strict=True)


def add_alike(part: Tensor, columns: Tensor, hidden: Tensor, is_first: bool) -> None:
    """Add a product of tensors in the dtype of the sum."""
    torch.addmm(part, columns, hidden, beta=0.0 if is_first else 1.0, out=part)


def add_rounded(
    backend: str, part: Tensor, columns: Tensor, hidden: Tensor, is_first: bool
) -> None:
    """Add a product of halves, rounded to their dtype."""
    operators.call("accumulate", backend, part, torch.mm(columns, hidden), is_first)


def add_in_fp32(part: Tensor, columns: Tensor, hidden: Tensor, is_first: bool) -> None:
    """Add a product of halves that is not rounded, on a GPU that does this rightly."""
    (products.multiply if is_first else products.add)(part, columns, hidden)
