"""Step segmentation: from masks, ids, rows or marker tokens to the tensors of a `StepLayout`.

Every function here works on flat tokens cut into rows by `row_offsets` (int64 ``[R + 1]``) and is
linear in tokens. The implementations stand in ``segment.py`` of each backend.
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
        counts: int64 ``[3]``: number of action tokens; position of the first id that is smaller
            than one before it in its row, or -1; number of steps.
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
    token_ids: Tensor,
    row_offsets: Tensor,
    starts: Tensor,
    start_offsets: Tensor,
    ends: Tensor,
    stops: Tensor,
    stop_offsets: Tensor,
    backend: str,
) -> Tensor:
    """Return the bool ``[N]`` mask of tokens that lie in an action.

    Sequences are read in a row alone. Where several `starts` begin at one token, only the longest
    counts. Between two tokens the first of these rules that applies decides: a `stops` sequence
    begins with the token behind, then no action is open; a `starts` sequence ends with the token
    before, then one is; one of `ends` is the token before, then none is; else it stays as it was.

    Args:
        token_ids: int64 ``[N]``.
        row_offsets: int64 ``[R + 1]``.
        starts: int64 ``[K]``: sequences end to end, none of them empty.
        start_offsets: int64 ``[n + 1]``: where they begin.
        ends: int64 ``[E]``.
        stops: like `starts`; there may be none.
        stop_offsets: like `start_offsets`.
        backend: the one that runs.
    """
    mask: Tensor = operators.call(
        "mark_actions",
        backend,
        token_ids,
        row_offsets,
        starts,
        start_offsets,
        ends,
        stops,
        stop_offsets,
    )
    return mask


def compact(
    step_ids: Tensor, num_steps: int, num_tokens: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the CSR form of ascending `step_ids`.

    Returns:
        token_index int64 ``[M]``, step_offsets int64 ``[S + 1]``, step_lengths int32 ``[S]``,
        step_starts int64 ``[S]``: see `StepTensors`.
    """
    index, offsets, lengths, starts = operators.call(
        "compact", backend, step_ids, num_steps, num_tokens
    )
    return index, offsets, lengths, starts


def row_trajectories(
    row_steps: Tensor, token_index: Tensor, step_offsets: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make every row a trajectory of its steps, none of which is empty.

    Returns:
        trajectory_steps int64 ``[S]``, trajectory_counts int32 ``[S]``, state_index int64 ``[S]``
        (the first token of each step) and step_rows int64 ``[S]``: see `StepTensors`.
    """
    steps, counts, states, rows = operators.call(
        "row_trajectories", backend, row_steps, token_index, step_offsets
    )
    return steps, counts, states, rows


def count_steps(
    mask: Tensor, boundaries: Tensor | None, row_offsets: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """Count the runs of ones of each row: `row_steps` and `counts` of `Segments`."""
    row_steps, counts = operators.call("count_steps", backend, mask, boundaries, row_offsets)
    return row_steps, counts


def lay_out_runs(
    mask: Tensor,
    boundaries: Tensor | None,
    row_offsets: Tensor,
    row_steps: Tensor,
    num_steps: int,
    num_actions: int,
    backend: str,
) -> tuple[Tensor, ...]:
    """Return the layout of the runs of ones, which `count_steps` has counted.

    `mask`, and with it `step_ids`, may be of any shape.

    Returns:
        What `segment_mask`, `compact` and `row_trajectories` return of it, one behind the other:
        step_ids; token_index, step_offsets, step_lengths, step_starts; trajectory_steps,
        trajectory_counts, step_rows. The states of the steps are valued where these start.
    """
    outputs: tuple[Tensor, ...] = operators.call(
        "lay_out_runs",
        backend,
        mask,
        boundaries,
        row_offsets,
        row_steps,
        num_steps,
        num_actions,
    )
    return outputs
