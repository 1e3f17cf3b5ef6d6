"""Step segmentation in plain PyTorch: see `steppo_kernels.layout.segment` for the contract."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_mask(
    mask: Tensor, boundaries: Tensor | None, row_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Number the runs of ones of each row."""
    continues = torch.zeros_like(mask)
    continues[1:] = mask[:-1]
    continues &= ~_row_starts(row_offsets, mask.numel())
    if boundaries is not None:
        continues &= ~boundaries
    return _number(mask, mask & ~continues, row_offsets)


def count_steps(
    mask: Tensor, boundaries: Tensor | None, row_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Count the runs of ones of each row."""
    _, row_steps, counts = segment_mask(*_flat(mask, boundaries), row_offsets)
    return row_steps, counts


def lay_out_runs(
    mask: Tensor,
    boundaries: Tensor | None,
    row_offsets: Tensor,
    row_steps: Tensor,
    num_steps: int,
    num_actions: int,
) -> tuple[Tensor, ...]:
    """Return the layout of runs that have been counted."""
    step_ids, *_ = segment_mask(*_flat(mask, boundaries), row_offsets)
    csr = compact(step_ids, num_steps, num_actions)
    steps, counts, _, rows = row_trajectories(row_steps, csr[0], csr[1])
    return step_ids.view(mask.shape), *csr, steps, counts, rows


def _flat(mask: Tensor, boundaries: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return mask.view(-1), None if boundaries is None else boundaries.view(-1)


def segment_ids(ids: Tensor, row_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number the distinct (row, id) pairs with id >= 0."""
    action = ids >= 0
    before = _largest_before(ids, row_offsets)
    step_ids, row_steps, counts = _number(action, action & (ids > before), row_offsets)
    decreasing = (action & (ids < before)).nonzero().squeeze(1)
    if decreasing.numel():
        counts[1] = decreasing[0]
    return step_ids, row_steps, counts


def segment_rows(mask: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Make each row a step."""
    if valid is not None:
        mask = mask & valid[:, None]
    rows = torch.arange(mask.shape[0] + 1, device=mask.device)
    step_ids = torch.where(mask, rows[:-1, None], -1).to(torch.int32)
    counts = torch.stack((mask.sum(), rows.new_tensor(-1), rows[-1]))
    return step_ids.reshape(-1), rows, counts


def mark_actions(
    token_ids: Tensor,
    row_offsets: Tensor,
    starts: Tensor,
    start_offsets: Tensor,
    ends: Tensor,
    stops: Tensor,
    stop_offsets: Tensor,
) -> Tensor:
    """Return the mask of tokens in actions: after one of `starts`, up to an end or a stop."""
    num_tokens = token_ids.numel()
    place = torch.arange(num_tokens, device=token_ids.device)
    row = torch.searchsorted(row_offsets, place, right=True) - 1
    first, last = row_offsets[row], row_offsets[row + 1]
    # What stands between a token and the one before it.
    opens = torch.zeros(num_tokens, dtype=torch.bool, device=token_ids.device)
    started = _longest(token_ids, last, starts, start_offsets)
    behind = place + started
    opens[behind[(started > 0) & (behind < last)]] = True
    closes = torch.zeros_like(opens)
    closes[1:] = torch.isin(token_ids, ends)[:-1]
    stopped = _longest(token_ids, last, stops, stop_offsets) > 0
    # The last event decides: opening an open action and closing a closed one change nothing.
    opened = _latest(opens & ~stopped, place, first)
    closed = _latest((closes & ~opens) | stopped, place, first)
    return opened > closed


def compact(step_ids: Tensor, num_steps: int, num_tokens: int) -> tuple[Tensor, ...]:
    """Return the CSR form of ascending `step_ids`."""
    token_index = (step_ids >= 0).nonzero().squeeze(1)
    steps = torch.arange(num_steps + 1, device=step_ids.device, dtype=step_ids.dtype)
    step_offsets = torch.searchsorted(step_ids[token_index], steps)
    lengths = step_offsets.diff().to(torch.int32)
    return token_index, step_offsets, lengths, step_starts(token_index, step_offsets)


def row_trajectories(
    row_steps: Tensor, token_index: Tensor, step_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make every row a trajectory of its steps, none of which is empty."""
    lengths = row_steps.diff()
    num_steps = step_offsets.numel() - 1
    rows = torch.arange(lengths.numel(), device=row_steps.device)
    step_rows = torch.repeat_interleave(rows, lengths, output_size=num_steps)
    return (
        torch.arange(num_steps, device=row_steps.device),
        lengths.to(torch.int32)[step_rows],
        token_index[step_offsets[:-1]],
        step_rows,
    )


def step_starts(token_index: Tensor, step_offsets: Tensor) -> Tensor:
    """Return the first position of each step whose positions follow each other, else -1."""
    num_tokens = token_index.numel()
    if num_tokens == 0:
        return torch.full_like(step_offsets[:-1], -1)
    # The number of jumps before a token is the same all over a step without one.
    jumps = torch.zeros_like(token_index)
    jumps[1:] = (token_index.diff() != 1).cumsum(0)
    first = step_offsets[:-1].clamp_max(num_tokens - 1)
    last = (step_offsets[1:] - 1).clamp_min(0)
    is_whole = (step_offsets.diff() > 0) & (jumps[first] == jumps[last])
    return torch.where(is_whole, token_index[first], -1)


def _number(action: Tensor, start: Tensor, row_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    number = start.cumsum(0)
    step_ids = torch.where(action, number - 1, -1).to(torch.int32)
    row_steps = torch.cat((number.new_zeros(1), number))[row_offsets]
    return step_ids, row_steps, torch.stack((action.sum(), number.new_tensor(-1), row_steps[-1]))


def _row_starts(row_offsets: Tensor, num_tokens: int) -> Tensor:
    starts = torch.zeros(num_tokens + 1, dtype=torch.bool, device=row_offsets.device)
    starts[row_offsets] = True
    return starts[:-1]


def _largest_before(ids: Tensor, row_offsets: Tensor) -> Tensor:
    """Return the largest id before each token in its row, -1 where there is none."""
    if ids.numel() == 0:
        return ids
    # One running maximum serves all rows: it only has to forget the rows before. Ranks of
    # (row, id) pairs are small numbers whatever the ids are.
    lengths = row_offsets.diff()
    row = torch.repeat_interleave(torch.arange(len(lengths), device=ids.device), lengths)
    values, rank = torch.unique(ids, return_inverse=True)
    key = row * (len(values) + 1) + rank
    before = torch.full_like(key, -1)
    before[1:] = key.cummax(0).values[:-1]
    # The rank 0 before the first token of a row stands for no id.
    found = before - row * (len(values) + 1)
    return torch.where(found >= 0, values[found.clamp_min(0)].clamp_min(-1), -1)


def _longest(token_ids: Tensor, last: Tensor, sequences: Tensor, offsets: Tensor) -> Tensor:
    """Return the length of the longest sequence that begins with each token, 0 for none.

    `last` is where the rows of the tokens end.
    """
    place = torch.arange(token_ids.numel(), device=token_ids.device)
    longest = torch.zeros_like(place)
    for sequence in torch.tensor_split(sequences, offsets[1:-1].cpu()) if len(sequences) else ():
        matches = place + len(sequence) <= last
        for k, token in enumerate(sequence):
            matches &= torch.roll(token_ids, -k) == token
        longest = torch.where(matches, longest.clamp_min(len(sequence)), longest)
    return longest


def _latest(event: Tensor, place: Tensor, first: Tensor) -> Tensor:
    """Return the last place of `event` up to each token in its row, -1 for none."""
    if event.numel() == 0:
        return place
    last = torch.where(event, place, -1).cummax(0).values
    # What lies before the first token of a row is no event of it.
    return torch.where(last > first, last, -1)
