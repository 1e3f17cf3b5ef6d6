"""Rows of a batch: where they begin, and the order in time of rows that are steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from . import integers


def uniform_offsets(num_rows: int, row_length: int, device: torch.device) -> Tensor:
    """Return where rows of one length begin, int64 ``[R + 1]``."""
    if row_length == 0:
        return torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
    return torch.arange(0, num_rows * row_length + 1, row_length, device=device)


def row_offsets(name: str, values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return where the rows of `values` begin, int64 ``[R + 1]``; its argument is called `name`.

    Those are the rows of a 2-D input, or those of `cu_seqlens` of a packed one, ``[N]`` or
    ``[1, N]``.
    """
    if cu_seqlens is None:
        if values.dim() == 2:
            return uniform_offsets(values.shape[0], values.shape[1], values.device)
        return uniform_offsets(1, values.shape[0], values.device)
    offsets = checks.dims("cu_seqlens", checks.integer("cu_seqlens", cu_seqlens), (1,))
    checks.on_device("cu_seqlens", offsets, values.device)
    if values.dim() != 1 and values.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens: got it with {name} of shape {tuple(values.shape)}, expected a packed "
            "input, [N] or [1, N]"
        )
    numel = values.numel()
    ends = (0, numel)
    if offsets.numel() < 1 or (int(offsets[0]), int(offsets[-1])) != ends:
        raise ValueError(
            f"cu_seqlens: got {_ends(offsets)}, expected offsets from 0 to {numel}, the number of "
            "tokens"
        )
    if bool((offsets.diff() < 0).any()):
        where = int((offsets.diff() < 0).nonzero()[0])
        raise ValueError(
            f"cu_seqlens: got {int(offsets[where + 1])} after {int(offsets[where])} at position "
            f"{where + 1}, expected offsets that do not decrease"
        )
    # The caller may use the buffer for the next batch.
    return offsets.to(torch.int64, copy=True).contiguous()


def _ends(offsets: Tensor) -> str:
    if offsets.numel() == 0:
        return "an empty tensor"
    return f"offsets from {int(offsets[0])} to {int(offsets[-1])}"


def in_time_order(
    trajectory_ids: Tensor | Sequence[Any],
    step_indices: Tensor | Sequence[int],
    keep: Tensor,
    num_rows: int,
) -> tuple[Tensor, Tensor]:
    """Return rows `keep` by trajectory and step, and the CSR offsets of the trajectories."""
    codes = _trajectory_codes(trajectory_ids, num_rows, keep)
    indices = integers.vector("step_indices", step_indices).cpu().to(torch.int64)
    checks.same_shape("step_indices", indices, torch.Size((num_rows,)))
    return _order_rows(codes, indices[keep], keep)


def _trajectory_codes(ids: Tensor | Sequence[Any], num_rows: int, keep: Tensor) -> Tensor:
    """Return the trajectories of rows `keep` as 0, 1, ... in the order of first appearance."""
    if isinstance(ids, Tensor):
        checked = checks.integer("trajectory_ids", ids)
        checks.same_shape("trajectory_ids", checked, torch.Size((num_rows,)))
        distinct, codes = torch.unique(checked.cpu()[keep], return_inverse=True)
        first = torch.full_like(distinct, num_rows, dtype=torch.int64)
        first.scatter_reduce_(0, codes, torch.arange(len(codes), device="cpu"), "amin")
        return first.argsort().argsort()[codes]
    keys = [
        entry if isinstance(entry, str) else integers.index("trajectory_ids", entry, "or strings")
        for entry in integers.sequence("trajectory_ids", ids, "integers or strings")
    ]
    if len(keys) != num_rows:
        raise ValueError(f"trajectory_ids: got shape ({len(keys)},), expected ({num_rows},)")
    numbers: dict[object, int] = {}
    kept = [numbers.setdefault(keys[row], len(numbers)) for row in keep.tolist()]
    return torch.tensor(kept, dtype=torch.int64, device="cpu")


def _order_rows(codes: Tensor, indices: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return `rows` sorted by (trajectory code, step index), and the CSR offsets of the codes."""
    by_index = torch.argsort(indices, stable=True)
    order = by_index[torch.argsort(codes[by_index], stable=True)]
    codes, indices, rows = codes[order], indices[order], rows[order]
    same = (codes.diff() == 0) & (indices.diff() == 0)
    if bool(same.any()):
        where = int(same.nonzero()[0])
        raise ValueError(
            f"step_indices: got step {int(indices[where])} of one trajectory in rows "
            f"{int(rows[where])} and {int(rows[where + 1])}, expected distinct steps"
        )
    starts = torch.ones(len(codes), dtype=torch.bool, device="cpu")
    starts[1:] = codes.diff() != 0
    return rows, torch.cat(
        (starts.nonzero().squeeze(1), torch.tensor([len(codes)], dtype=torch.int64, device="cpu"))
    )
