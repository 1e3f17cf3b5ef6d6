"""How a launcher hands tensors to the compiled module."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C_cpu as kernels

__all__ = ["address", "dtype_code", "empty", "kernels", "pointer", "threads"]

threads = torch.get_num_threads


def pointer(value: Tensor | None) -> int:
    """Return the address of a tensor's data, 0 for None."""
    if value is None:
        return 0
    if not value.is_contiguous():
        raise RuntimeError("a kernel got a tensor that is not contiguous")
    return address(value)


def address(value: Tensor) -> int:
    """Return the address of a tensor's first element; its strides are the caller's to know."""
    found = value.data_ptr()
    if found == 0 and value.numel():
        # A fake tensor, or one of a subclass that wraps others.
        raise RuntimeError(
            f"a kernel got a {type(value).__name__} on {value.device}, expected a tensor with "
            "memory of its own on the CPU"
        )
    return found


def empty(shape: int | tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor on the CPU, whatever torch's default device is."""
    return torch.empty(shape, dtype=dtype, device="cpu")


_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def dtype_code(value: Tensor) -> int:
    """Return the number of a dtype in csrc/include/steppo/types.h."""
    return _DTYPES[value.dtype]
