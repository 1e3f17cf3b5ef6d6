"""Scratch memory that is kept between calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# The most that is kept.
KEPT_BYTES = 256 * 2**20

# One block at most; whoever uses it has taken it out.
_kept: list[Tensor] = []


@contextmanager
def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Lend an uninitialised tensor that nothing may refer to afterwards.

    torch keeps the memory of a GPU for the next call, but gives large blocks of a CPU back to the
    system, which then has to find and clear fresh pages in every call. One block of up to
    `KEPT_BYTES` is therefore kept.
    """
    fresh = torch.empty(0, dtype=dtype, device=device)
    # Neither a GPU's, nor compiled code's, nor what a mode of torch puts in place of tensors.
    if device.type != "cpu" or torch.compiler.is_compiling() or type(fresh) is not Tensor:
        yield fresh.new_empty(shape)
        return
    count = torch.Size(shape).numel()
    try:
        block = _kept.pop()
    except IndexError:
        block = fresh
    if block.dtype != dtype or len(block) < count:
        del block
        # A block outlives torch.inference_mode(), whose tensors may not be written elsewhere.
        with torch.inference_mode(False):
            block = torch.empty(count, dtype=dtype, device=device)
    try:
        yield block[:count].view(shape)
    finally:
        if 0 < block.nbytes <= KEPT_BYTES:
            _kept[:] = [block]


def release() -> None:
    """Give the kept memory back to the system."""
    _kept.clear()
