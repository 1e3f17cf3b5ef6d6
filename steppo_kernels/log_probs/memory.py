"""Memory of a CPU that is kept between calls.

torch keeps the memory of a GPU for the next call, but gives large blocks of a CPU back to the
system, which then has to find and clear fresh pages in every call.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# The most that is kept of scratch memory, and of gradients.
KEPT_BYTES, KEPT_GRADIENT_BYTES = 256 * 2**20, 2**31

# One at most of each. Scratch is not here while it is in use; the storage of a gradient may be.
_kept_scratch: list[Tensor] = []
_kept_gradient: list[torch.UntypedStorage] = []


@contextmanager
def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Lend an uninitialised tensor that nothing may refer to afterwards.

    One block of up to `KEPT_BYTES` is kept.
    """
    if not _can_keep(device):
        yield torch.empty(shape, dtype=dtype, device=device)
        return
    count = math.prod(shape)
    try:
        block = _kept_scratch.pop()
    except IndexError:
        block = None
    if block is None or block.dtype != dtype or len(block) < count:
        del block
        # A block outlives torch.inference_mode(), whose tensors may not be written elsewhere.
        with torch.inference_mode(False):
            block = torch.empty(count, dtype=dtype, device="cpu")
    try:
        yield block[:count].view(shape)
    finally:
        if 0 < block.nbytes <= KEPT_BYTES:
            _kept_scratch[:] = [block]


def gradient(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor, in memory that is kept when the tensor is dropped.

    Training drops a gradient in every step, and asks for the same in the next. The last storage is
    kept, if it has up to `KEPT_GRADIENT_BYTES`; it is used again if nothing else refers to it.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if not (_ALONE and 0 < nbytes <= KEPT_GRADIENT_BYTES and _can_keep(device)):
        return torch.empty(shape, dtype=dtype, device=device)
    # Taken out first: of two threads, one at most finds it.
    try:
        storage = _kept_gradient.pop()
    except IndexError:
        storage = None
    with torch.inference_mode(False):
        if (
            storage is None
            or _references(storage) != _ALONE
            or storage.nbytes() != nbytes
            # Another process may have shared memory too.
            or storage.is_shared()
        ):
            del storage
            storage = torch.empty(shape, dtype=dtype, device="cpu").untyped_storage()
        # Found or made, it is handed out in one way: a tensor that checkpointing computes anew is
        # told from one that was written to by its version, and may lie in the same memory.
        made = torch.empty(0, dtype=dtype, device="cpu").set_(storage).resize_(shape)
    _kept_gradient[:] = [storage]
    return made


def release() -> None:
    """Give the kept memory back to the system.

    Example:
        >>> from steppo_kernels import memory
        >>> memory.release()
    """
    _kept_scratch.clear()
    _kept_gradient.clear()


def _can_keep(device: torch.device) -> bool:
    # Only plain CPU tensors are kept: no GPU memory, nothing under torch.compile, no fake tensors
    # or other subclasses that a mode of torch creates.
    return (
        device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(torch.empty(0, dtype=torch.float32, device=device)) is Tensor
    )


def _references(storage: torch.UntypedStorage) -> tuple[int, int]:
    """Return how many refer to the Python object of a storage, and to its memory."""
    return sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)


def _alone() -> tuple[int, int] | None:
    """Return the references of a storage that is one function's alone.

    None if they do not tell: no torch promises to count them.
    """
    if not hasattr(torch._C, "_storage_Use_Count"):
        return None
    tensor = torch.empty(1, dtype=torch.float32, device="cpu")
    storage = tensor.untyped_storage()
    held = _references(storage)
    del tensor
    alone = _references(storage)
    return alone if alone[1] < held[1] else None


_ALONE = _alone()
