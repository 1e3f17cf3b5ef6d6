"""How a launcher hands records to compiled code.

A record is a tuple in the order of csrc/include/steppo/records.inc, which a test compares with the
names that launchers write: addresses of tensors, 0 where there is none, and numbers.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import _C_cpu as kernels
from ..records import template

__all__ = [
    "DTYPES",
    "addresses",
    "empty",
    "kernels",
    "new_metrics",
    "place",
    "scalar_like",
    "start",
]

# The numbers of dtypes in csrc/include/steppo/types.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def addresses(*values: Tensor | None) -> list[int]:
    """Return the addresses of contiguous tensors, 0 for None."""
    found = []
    for value in values:
        if value is None:
            found.append(0)
        elif value.is_contiguous():
            found.append(value.data_ptr() or start(value))
        else:
            raise RuntimeError("a kernel got a tensor that is not contiguous")
    return found


def start(value: Tensor) -> int:
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


_CPU = torch.device("cpu")
_SCALARS = {dtype: template((), dtype, _CPU) for dtype in DTYPES}


def scalar_like(value: Tensor) -> Tensor:
    """Return an uninitialised 0-dim tensor of the dtype of `value`."""
    return torch.empty_like(_SCALARS[value.dtype])


def new_metrics(count: int) -> Tensor:
    """Return an uninitialised vector of so many metrics."""
    return torch.empty_like(_metrics_template(count))


@functools.cache
def _metrics_template(count: int) -> Tensor:
    return template((count,), torch.float64, _CPU)


def place() -> tuple[int, ...]:
    """Return where a call runs: the record ``Place``."""
    return (torch.get_num_threads(), 0, 0, 0)
