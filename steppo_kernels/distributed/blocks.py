"""Tensors of all ranks in one gather: their bytes, block by block, as words of a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..ranks import Call

# The words of a call are rows of so many numbers of 8 bytes. No arithmetic is done with them.
_NUMBERS = 64
WORD_BYTES = 8 * _NUMBERS
# Where a block may begin, so that its bytes can be read as numbers of any dtype.
ALIGNMENT = 16


class Blocks:
    """Puts tensors ``[T_r, ...]`` of the ranks together to ``[T, ...]``.

    A block has room for the tokens of the rank that has the most.

    Attributes:
        mark: a number of 64 bits that other ways to put tokens together hardly share.
    """

    def __init__(self, every: Sequence[Tensor], length: int) -> None:
        """Take the places in T of the tokens of each rank, int64 ``[T_r]`` on the CPU."""
        self._most = max(len(places) for places in every)
        # Where the token of each place stands in the gathered blocks.
        self._sources = torch.empty(length, dtype=torch.int64, device="cpu")
        for rank, places in enumerate(every):
            own = torch.arange(len(places), device="cpu")
            self._sources[places] = rank * self._most + own
        self._on: dict[torch.device, Tensor] = {}
        # The same keys on all ranks. The sum wraps around.
        generator = torch.Generator("cpu").manual_seed(0)
        bounds = torch.iinfo(torch.int64)
        keys = torch.empty_like(self._sources).random_(bounds.min, bounds.max, generator=generator)
        self.mark = int(((self._sources + 1) * keys).sum())

    def word(self, parts: Sequence[Tensor]) -> tuple[int, int]:
        """Return the rows and columns of the word that such parts need."""
        *_, (_, size) = self._places(parts)
        return -(-size // WORD_BYTES), _NUMBERS

    def gather(self, call: Call, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return the parts of all ranks, ``[T, ...]`` each: one collective."""
        device = parts[0].device
        rows, columns = self.word(parts)
        sent = torch.zeros(rows * WORD_BYTES, dtype=torch.uint8, device=device)
        for part, (begin, _) in zip(parts, self._places(parts), strict=True):
            stored = part.detach().contiguous().view(-1).view(torch.uint8)
            sent[begin : begin + len(stored)] = stored
        every = call.gather(sent.view(torch.float64).view(rows, columns), last=True)
        heard = every.contiguous().view(len(every), -1).view(torch.uint8)
        if device not in self._on:
            self._on[device] = self._sources.to(device)
        found = []
        for part, (begin, end) in zip(parts, self._places(parts), strict=True):
            each = part.shape[1:].numel()
            block = heard[:, begin:end].contiguous().view(part.dtype)
            block = block[:, : self._most * each].reshape(len(every) * self._most, each)
            ordered = block.index_select(0, self._on[device])
            found.append(ordered.view(len(ordered), *part.shape[1:]))
        return found

    def _places(self, parts: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
        """Yield where the bytes of each part begin and end, with what is behind them."""
        begin = 0
        for part in parts:
            size = self._most * part.shape[1:].numel() * part.itemsize
            end = begin + -(-size // ALIGNMENT) * ALIGNMENT
            yield begin, end
            begin = end
