"""Step segmentation: from masks, ids, rows or marker tokens to the tensors of a `StepLayout`.

Every function here works on flat tokens cut into rows by `row_offsets` (int64 ``[R + 1]``) and is
linear in tokens. The implementations stand in `reference/segment.py`, `cpu/segment.py` and
`triton/segment.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..backends import operators


class Segments(NamedTuple):
    """Step ids of a flat batch.

    Attributes:
        step_ids: int32 ``[N]``, -1 where no action token.
        row_steps: int64 ``[R + 1]``, CSR offsets: the steps of row r are
            ``row_steps[r]:row_steps[r + 1]``.
        counts: int64 ``[2]``: number of action tokens; position of the first id that is smaller
            than one before it in its row, or -1.
    """

    step_ids: Tensor
    row_steps: Tensor
    counts: Tensor


def segment_mask(
    mask: Tensor, boundaries: Tensor | None, row_offsets: Tensor, backend: str
) -> Segments:
    """Number the runs of ones of each row. `mask`, `boundaries`: bool ``[N]``."""
    return Segments(*operators.call("segment_mask", backend, mask, boundaries, row_offsets))


def segment_ids(ids: Tensor, row_offsets: Tensor, backend: str) -> Segments:
    """Number the distinct (row, id) pairs with id >= 0. `ids`: int64 ``[N]``."""
    return Segments(*operators.call("segment_ids", backend, ids, row_offsets))


def segment_rows(mask: Tensor, valid: Tensor | None, backend: str) -> Segments:
    """Make each row a step. `mask`: bool ``[R, T]``; `valid`: bool ``[R]``."""
    return Segments(*operators.call("segment_rows", backend, mask, valid))


def mark_actions(
    token_ids: Tensor, row_offsets: Tensor, start: Tensor, end: int, backend: str
) -> Tensor:
    """Return the bool ``[N]`` mask of tokens after a `start` sequence up to the next `end`.

    `token_ids`: int64 ``[N]``; `start`: int64 ``[K]``, K >= 1.
    """
    mask: Tensor = operators.call("mark_actions", backend, token_ids, row_offsets, start, end)
    return mask


def compact(
    step_ids: Tensor, num_steps: int, num_tokens: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the CSR form of ascending `step_ids`.

    Returns:
        token_index int64 ``[M]``, step_offsets int64 ``[S + 1]``, step_lengths int32 ``[S]``.
    """
    index, offsets, lengths = operators.call("compact", backend, step_ids, num_steps, num_tokens)
    return index, offsets, lengths
