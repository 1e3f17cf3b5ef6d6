"""How launchers hand records to compiled code; they serve every backend that has such code.

A record is a tuple in the order of csrc/include/steppo/records.inc, which a test compares with the
names that launchers write: addresses of tensors, 0 where there is none, and numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..modules import module_of
from ..records import template
from .place import Streams, on_threads

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


def number(value: Tensor | None, like: Tensor) -> tuple[int, float] | None:
    """Return a 0-dim fp64 tensor as the ``Number`` of csrc/include/steppo/types.h.

    It goes by address, so that nothing waits for it, to kernels on the device of `like`. A GPU
    cannot read what lies on the CPU: that goes by value.
    """
    if value is None:
        return None
    return (0, value.item()) if value.is_cpu and not like.is_cpu else (start(value), 0.0)


def start(value: Tensor) -> int:
    """Return the address of a tensor's first element; its strides are the caller's to know."""
    found = value.data_ptr()
    if found == 0 and value.numel():
        # A fake tensor, or one of a subclass that wraps others.
        raise RuntimeError(
            f"a kernel got a {type(value).__name__} on {value.device}, expected a tensor with "
            "memory of its own"
        )
    return found


def empty(like: Tensor, shape: int | tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor on the device of `like`."""
    return like.new_empty(shape, dtype=dtype)


def scalar_like(value: Tensor) -> Tensor:
    """Return an uninitialised 0-dim tensor of the dtype of `value`, on its device."""
    return torch.empty_like(_template((), value.dtype, value.device))


def new_metrics(like: Tensor, count: int) -> Tensor:
    """Return an uninitialised vector of so many metrics on the device of `like`."""
    return torch.empty_like(_template((count,), torch.float64, like.device))


def new_scale(native: Native, metrics: Tensor) -> Tensor | None:
    """Return room for what gradients of a loss lack, None where kernels write them whole.

    A CPU counts the steps before it writes gradients. The blocks of a GPU know them last.
    """
    return None if native.is_done else scalar_like(metrics)


_template = functools.cache(template)


class Native(NamedTuple):
    """The kernels of a compiled backend, and where they run.

    Attributes:
        kernels: the module of the bindings.
        place: returns the record ``Place`` of a call on a tensor.
        is_done: whether the outputs of a call are there when it returns.
    """

    kernels: Any
    place: Callable[[Tensor], tuple[int, ...]]
    is_done: bool


def native_of(backend: str) -> Native:
    """Return what the launchers of a compiled backend take first."""
    kernels = module_of(backend)
    if backend == "cpu":
        return Native(kernels, on_threads, is_done=True)
    return Native(kernels, Streams(kernels), is_done=False)
