"""Products in the dtypes of what they are given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

_Self = TypeVar("_Self")
_P = ParamSpec("_P")
_R = TypeVar("_R")
_Method = Callable[Concatenate[_Self, Tensor, _P], _R]


def without_autocast(method: _Method[_Self, _P, _R]) -> _Method[_Self, _P, _R]:
    """Turn autocast off in a method, on the device of the tensor that it is given first.

    The arguments of a head have been cast. Autocast would also round what kernels computed in
    fp32, to a half whose range it may leave, and in a backward pass what the forward did not.
    """

    @functools.wraps(method)
    def run(self: _Self, first: Tensor, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.autocast(first.device.type, enabled=False):
            return method(self, first, *args, **kwargs)

    return run
