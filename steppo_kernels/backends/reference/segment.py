"""Step segmentation in plain PyTorch: see `steppo_kernels.segment` for the contract."""

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
    return step_ids.reshape(-1), rows, torch.stack((mask.sum(), rows.new_tensor(-1)))


def mark_actions(token_ids: Tensor, row_offsets: Tensor, start: Tensor, end: int) -> Tensor:
    """Return the mask of tokens after a `start` sequence up to the next `end`."""
    num_tokens = token_ids.numel()
    position = torch.arange(num_tokens, device=token_ids.device)
    row = torch.searchsorted(row_offsets, position, right=True) - 1
    in_row = position - row_offsets[row]
    opens = in_row >= len(start) - 1
    for k, token in enumerate(start.flip(0)):
        opens &= torch.roll(token_ids, k) == token
    # Which of the two events came last before a token decides whether the token is in an action.
    # Opening an open action and closing a closed one change nothing, so "last" is enough.
    opened = _last_before(opens, position, in_row)
    closed = _last_before((token_ids == end) & ~opens, position, in_row)
    return (opened > closed) & (in_row > 0)


def compact(step_ids: Tensor, num_steps: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the CSR form of ascending `step_ids`."""
    token_index = (step_ids >= 0).nonzero().squeeze(1)
    steps = torch.arange(num_steps + 1, device=step_ids.device, dtype=step_ids.dtype)
    step_offsets = torch.searchsorted(step_ids[token_index], steps)
    return token_index, step_offsets, step_offsets.diff().to(torch.int32)


def _number(action: Tensor, start: Tensor, row_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    number = start.cumsum(0)
    step_ids = torch.where(action, number - 1, -1).to(torch.int32)
    row_steps = torch.cat((number.new_zeros(1), number))[row_offsets]
    return step_ids, row_steps, torch.stack((action.sum(), number.new_tensor(-1)))


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


def _last_before(event: Tensor, position: Tensor, in_row: Tensor) -> Tensor:
    """Return the last position of `event` before each token in its row, -1 for none."""
    if event.numel() == 0:
        return position
    last = torch.where(event, position, -1).cummax(0).values
    before = torch.full_like(last, -1)
    before[1:] = last[:-1]
    return torch.where(before >= position - in_row, before, -1)
