"""Ragged arrays: the members of the groups end to end, and the offsets where groups begin (CSR)."""

from __future__ import annotations

import torch
from torch import Tensor


def prefix(counts: Tensor) -> Tensor:
    """Return the CSR offsets of `counts`: 0, then the running sums."""
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return starts[0], starts[0] + 1, ..., `lengths[0]` of them, then those of starts[1], ..."""
    offsets = prefix(lengths)
    total = int(offsets[-1])
    shift = torch.repeat_interleave(starts - offsets[:-1], lengths, output_size=total)
    return torch.arange(total, device=starts.device) + shift


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
