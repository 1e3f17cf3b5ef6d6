"""Memory of a CPU that is kept between calls.

torch keeps the memory of a GPU for the next call, but gives large blocks of a CPU back to the
system, which then has to find and clear fresh pages in every call.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# The most that is kept of scratch memory, and of gradients.
KEPT_BYTES, KEPT_GRADIENT_BYTES = 256 * 2**20, 2**31

# One block at most of each; whoever uses it has taken it out.
_kept_scratch: list[Tensor] = []
_kept_gradient: list[Tensor] = []


@contextmanager
def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Lend an uninitialised tensor that nothing may refer to afterwards.

    One block of up to `KEPT_BYTES` is kept.
    """
    if not _can_keep(device):
        yield torch.empty(shape, dtype=dtype, device=device)
        return
    count = torch.Size(shape).numel()
    block = _take(_kept_scratch, count, dtype)
    try:
        yield block[:count].view(shape)
    finally:
        _keep(_kept_scratch, block, KEPT_BYTES)


def gradient(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor whose memory is kept once nothing refers to it any more.

    Training drops a gradient in every step, and asks for the same in the next. One block of up to
    `KEPT_GRADIENT_BYTES` is kept.
    """
    count = torch.Size(shape).numel()
    if count == 0 or not _can_keep(device):
        return torch.empty(shape, dtype=dtype, device=device)
    block = _take(_kept_gradient, count, dtype)
    # What the tensor's storage refers to: it ends with the last of the tensors that share it.
    lease = (ctypes.c_char * block.nbytes).from_address(block.data_ptr())
    weakref.finalize(lease, _end, block).atexit = False
    return torch.frombuffer(lease, dtype=dtype, count=count).view(shape)


def release() -> None:
    """Give the kept memory back to the system."""
    _kept_scratch.clear()
    _kept_gradient.clear()


def _can_keep(device: torch.device) -> bool:
    # Neither a GPU's, nor compiled code's, nor what a mode of torch puts in place of tensors.
    return (
        device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(torch.empty(0, device=device)) is Tensor
    )


def _take(kept: list[Tensor], count: int, dtype: torch.dtype) -> Tensor:
    """Return a block of at least `count` numbers: the kept one if it is one."""
    try:
        block = kept.pop()
    except IndexError:
        pass
    else:
        if block.dtype == dtype and len(block) >= count:
            return block
        del block
    # A block outlives torch.inference_mode(), whose tensors may not be written elsewhere.
    with torch.inference_mode(False):
        return torch.empty(count, dtype=dtype, device="cpu")


def _keep(kept: list[Tensor], block: Tensor, most: int) -> None:
    if 0 < block.nbytes <= most:
        kept[:] = [block]


def _end(block: Tensor) -> None:
    _keep(_kept_gradient, block, KEPT_GRADIENT_BYTES)
