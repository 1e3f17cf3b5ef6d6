"""Which places of a token dimension each rank has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..layout import integers
from ..layout.rows import row_offsets


def rows_of(length: int, cu_seqlens: Tensor | Sequence[int] | None) -> list[tuple[int, int]]:
    """Return where the rows of a token dimension begin and end; without `cu_seqlens` it is one."""
    if cu_seqlens is None:
        return [(0, length)]
    given = integers.vector("cu_seqlens", cu_seqlens).cpu()
    ends = row_offsets(
        "length", torch.empty(length, dtype=torch.bool, device="cpu"), given
    ).tolist()
    return list(pairwise(ends)) or [(0, 0)]


def contiguous(rows: Sequence[tuple[int, int]], size: int) -> list[Tensor]:
    """Return the places of each rank: of each row, one of as many chunks as there are ranks."""
    return [torch.cat(own) for own in zip(*(_chunks(row, size) for row in rows), strict=True)]


def zigzag(rows: Sequence[tuple[int, int]], size: int) -> list[Tensor]:
    """Return the places of each rank: of each row, one chunk from the front and one from behind."""
    chunks = [_chunks(row, 2 * size) for row in rows]
    return [
        torch.cat([part for row in chunks for part in (row[rank], row[-1 - rank])])
        for rank in range(size)
    ]


def _chunks(row: tuple[int, int], number: int) -> list[Tensor]:
    """Return so many chunks of the places of a row as `torch.chunk` makes them, empty ones too."""
    begin, end = row
    length = -(-(end - begin) // number)
    starts = [min(begin + place * length, end) for place in range(number + 1)]
    return [torch.arange(first, last, device="cpu") for first, last in pairwise(starts)]


def check_cover(every: Sequence[Tensor], length: int) -> None:
    """Check that each place is that of one token of one rank; all ranks see the same."""
    holders = torch.bincount(torch.cat(list(every)), minlength=length)
    wrong = (holders != 1).nonzero()
    if len(wrong):
        place = int(wrong[0])
        ranks = [
            str(rank)
            for rank, columns in enumerate(every)
            for _ in range(int((columns == place).sum()))
        ]
        held = f"on ranks {', '.join(ranks)}" if ranks else "on no rank"
        raise ValueError(f"columns: got place {place} {held}, expected each place on one rank")


def check_dim(value: object) -> int:
    """Return the token dimension of ``[B, T]`` or of ``[N]``."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in (0, 1):
        raise ValueError(f"dim: got {value!r}, expected 0 or 1")
    return value
