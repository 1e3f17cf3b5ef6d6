"""How a launcher hands tensors to the compiled module."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C_cpu as kernels

__all__ = ["dtype_code", "kernels", "pointer", "threads"]

threads = torch.get_num_threads


def pointer(value: Tensor | None) -> int:
    """Return the address of a tensor's data, 0 for None."""
    if value is None:
        return 0
    if not value.is_contiguous():
        raise RuntimeError("a kernel got a tensor that is not contiguous")
    return value.data_ptr()


_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def dtype_code(value: Tensor) -> int:
    """Return the number of a dtype in csrc/include/steppo/types.h."""
    return _DTYPES[value.dtype]
