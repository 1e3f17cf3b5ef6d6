"""Ragged arrays: the members of the groups end to end, and the offsets where groups begin (CSR)."""

from __future__ import annotations

import torch
from torch import Tensor


def prefix(counts: Tensor) -> Tensor:
    """Return the CSR offsets of `counts`: 0, then the running sums."""
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def ranges(starts: Tensor, lengths: Tensor, total: int | None = None) -> Tensor:
    """Return starts[0], starts[0] + 1, ..., `lengths[0]` of them, then those of starts[1], ...

    If their number `total` is not known, the host waits for it.
    """
    offsets = prefix(lengths)
    total = int(offsets[-1]) if total is None else total
    shift = torch.repeat_interleave(starts - offsets[:-1], lengths, output_size=total)
    return torch.arange(total, device=starts.device) + shift


def group_of(places: Tensor, offsets: Tensor) -> Tensor:
    """Return the group that each of `places` (int64, members by their number) belongs to."""
    return torch.searchsorted(offsets, places, right=True) - 1


def owners(members: Tensor, offsets: Tensor, count: int) -> Tensor:
    """Return the group that has each of `count` members (int64), -1 for one of no group.

    `members` are those of the groups, end to end.
    """
    found = members.new_full((count,), -1)
    found[members] = group_of(torch.arange(len(members), device=members.device), offsets)
    return found


def regrouped(keys: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Return the members in the order of their keys, and the CSR offsets of the groups.

    Members of one key stay in their order. Members with the key -1 are left out.
    """
    order = torch.argsort(keys, stable=True)
    counts = torch.bincount(keys + 1, minlength=num_groups + 1)
    return order[int(counts[0]) :], prefix(counts[1:])


def rows_of_steps(
    token_index: Tensor, step_offsets: Tensor, row_offsets: Tensor, empty: Tensor
) -> Tensor:
    """Return the row of each step's first token, int64 ``[S]``; of an empty step that of `empty`.

    Args:
        token_index: int64 ``[M]``.
        step_offsets: int64 ``[S + 1]``.
        row_offsets: int64 ``[R + 1]``.
        empty: int64 ``[S]``.
    """
    if len(token_index) == 0:
        return empty.clone()
    first = token_index[step_offsets[:-1].clamp_max(len(token_index) - 1)]
    return torch.where(step_offsets.diff() > 0, group_of(first, row_offsets), empty)


def count_nonempty(
    lengths: Tensor, steps: Tensor, trajectory_offsets: Tensor, num_steps: int
) -> Tensor:
    """Return for each step the number of non-empty steps in its trajectory, int32 ``[S]``.

    `lengths` is indexed by `steps`.
    """
    nonempty = prefix((lengths[steps] > 0).to(torch.int64))
    per_trajectory = nonempty[trajectory_offsets].diff()
    counts = torch.zeros(num_steps, dtype=torch.int32, device=steps.device)
    counts[steps] = torch.repeat_interleave(
        per_trajectory, trajectory_offsets.diff(), output_size=steps.numel()
    ).to(torch.int32)
    return counts


def nearest(wanted: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each member the nearest wanted one before it and after it in its group.

    The entry of a member that has none is its own place; so is that of a wanted one.
    """
    place = torch.arange(len(wanted), device=wanted.device)
    group = torch.repeat_interleave(
        torch.arange(len(offsets) - 1, device=wanted.device),
        offsets.diff(),
        output_size=len(wanted),
    )
    before = torch.where(wanted, place, -1).cummax(0).values
    after = torch.where(wanted, place, len(wanted)).flip(0).cummin(0).values.flip(0)
    has_before = before >= offsets[group]
    has_after = after < offsets[group + 1]
    return torch.where(has_before, before, place), torch.where(has_after, after, place)


def nearest_before_else_after(wanted: Tensor, offsets: Tensor) -> Tensor:
    """Return for each member the nearest wanted one before it in its group, else the next one.

    The entry of a member whose group has none is its own place; so is that of a wanted one.
    """
    before, after = nearest(wanted, offsets)
    return torch.where(wanted[before], before, after) if len(wanted) else before
