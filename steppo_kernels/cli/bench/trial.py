"""A problem made ready: its exact answer, the step that is timed, and the check before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...backends.choice import Backend
from .case import Inputs, Outputs, Problem, differentiated

Call = Callable[[Inputs, Backend], Any]

# How far an output may be off, relative to its largest entry. This tells a wrong answer from a
# right one; `validate` tells how right it is.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.03}
_NAMES = tuple(map(str, _TOLERANCE))
# Errors are relative to this where all is 0.
_TINY = 1e-30


class Wrong(Exception):
    """A variant gives a wrong answer."""


class Trial:
    """One call on inputs that need gradients where the problem says so."""

    def __init__(self, problem: Problem, dtype: torch.dtype | None = None) -> None:
        """Take a problem, its floating inputs converted to `dtype` if there is one."""
        self._problem = problem
        self._inputs = {
            name: value.detach() if dtype is None else value.detach().to(dtype)
            for name, value in problem.inputs.items()
        }
        self._leaves = [self._inputs[name].requires_grad_() for name in problem.leaves]
        upstream = problem.upstream
        self._upstream = upstream if upstream is None or dtype is None else upstream.to(dtype)

    def step(self, call: Call, backend: Backend) -> Callable[[], object]:
        """Return the call without arguments, with its backward pass if it has one."""
        inputs, leaves, upstream = self._inputs, self._leaves, self._upstream
        if not leaves:
            return lambda: call(inputs, backend)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(differentiated(call(inputs, backend)), leaves, upstream)

        return both

    def answer(self, call: Call, backend: Backend) -> Outputs:
        """Return the outputs of the call, and its gradients as ``grad_...``."""
        found = call(self._inputs, backend)
        outputs = {name: value.detach() for name, value in self._problem.outputs(found).items()}
        if self._leaves:
            grads = torch.autograd.grad(differentiated(found), self._leaves, self._upstream)
            names = (f"grad_{name}" for name in self._problem.leaves)
            outputs |= zip(names, grads, strict=True)
        return outputs

    def check(self, got: Outputs, exact: Outputs) -> float:
        """Return the largest error of an answer.

        Raises:
            Wrong: an output is not what it has to be.
        """
        largest = 0.0
        for name, wanted in exact.items():
            found, expected = got[name], tuple(wanted.shape)
            if tuple(found.shape) != expected:
                raise Wrong(f"{name}: got shape {tuple(found.shape)}, expected {expected}")
            if not wanted.is_floating_point():
                if not torch.equal(found, wanted):
                    raise Wrong(f"{name}: differs")
                continue
            if found.dtype not in _TOLERANCE:
                raise Wrong(f"{name}: got {found.dtype}, expected one of {', '.join(_NAMES)}")
            allowed = self._problem.tolerance or _TOLERANCE[found.dtype]
            error = _relative_error(found, wanted)
            # An error that is no number is not within the tolerance.
            if not error <= allowed:
                raise Wrong(f"{name}: off by {error:.1e} of its largest entry, not {allowed:g}")
            largest = max(largest, error)
        return largest


def _relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the largest error, relative to the largest entry; of a sum of terms of 1, to 1."""
    scale = exact.abs().amax().clamp_min(1.0 if exact.dim() == 0 else _TINY)
    return float((found.to(exact.dtype) - exact).abs().amax() / scale)


def exact_answer(problem: Problem) -> Outputs:
    """Return the reference's answer in fp64, or of half precision in fp32: that is wider too."""
    is_half = any(value.dtype in checks.HALF_DTYPES for value in problem.inputs.values())
    wider = Trial(problem, torch.float32 if is_half else torch.float64)
    return wider.answer(problem.call, "reference")
