"""Functions that compiled code traces, and functions that it calls as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.compiler import is_compiling

_P = ParamSpec("_P")
_R = TypeVar("_R")
# Dynamo of an older torch knows no properties of named tuples, which layouts hold.
_OLDEST_THAT_TRACES = "2.11"


def untraced(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return a function at which a graph breaks: what it does depends on numbers of a batch.

    `torch.compiler.disable` does that too, but imports the compiler where nothing is compiled.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if is_compiling():
            disabled: Callable[_P, _R] = torch.compiler.disable(function)
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return run


def traced(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return a function that is part of a graph; `untraced` with a torch that is too old."""
    return function if torch.__version__ >= _OLDEST_THAT_TRACES else untraced(function)


def traced_without(*names: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Return a decorator of functions that are `traced` if they are given no such keyword."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            is_given = any(kwargs.get(name) is not None for name in names)
            return (untraced(function) if is_given else function)(*args, **kwargs)

        return traced(run)

    return decorate
