"""Memory for large outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends


def large_empty(
    shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return an uninitialised tensor that is about to be written in full.

    On a CPU, its pages are asked to be huge: the first write to fresh small ones takes longer than
    a matrix product that fills them.
    """
    made = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and backends.why_not_cpu() is None:
        from . import _C_cpu

        _C_cpu.prefer_huge_pages(made.data_ptr(), made.numel() * made.element_size())
    return made
