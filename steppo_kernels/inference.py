"""Plain tensors in inference mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.compiler import is_compiling

_Function = TypeVar("_Function", bound=Callable[..., Any])


def outside_inference_mode(function: _Function) -> _Function:
    """Let `function` make plain tensors in inference mode too.

    A tensor of inference mode cannot be saved for a backward pass, and nobody counts the writes to
    it.
    """

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        # Dynamo does not trace the question. A graph has its own answer to it.
        if is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **options)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **options)

    return run  # type: ignore[return-value]
