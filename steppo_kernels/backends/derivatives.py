"""First derivatives alone, in reverse mode and one at a time: what no kernel gives raises.

A gradient of a kernel raises where it would be differentiated again.

`torch.autograd.function.once_differentiable` looks at the incoming gradients only. These carry no
graph when a loss is differentiated with ``create_graph=True``, so that the returned gradient counts
as a constant and a second derivative is silently 0. Here it is tied to the inputs of the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

Backward = Callable[..., Any]

# Those of `torch.autograd.grad(is_grads_batched=True)`, and of `torch.func.vmap`.
_IS_BATCHED = tuple(
    getattr(torch._C._functorch, name)
    for name in ("is_legacy_batchedtensor", "is_batchedtensor")
    if hasattr(torch._C._functorch, name)
)


def wants_gradient(*values: Tensor | None) -> bool:
    """Return whether autograd is to record what kernels make of `values`.

    Raises:
        RuntimeError: one is a dual number of forward mode, whose tangent would be lost.
    """
    if not is_compiling() and forward_ad._current_level >= 0:
        for value in values:
            if value is not None and forward_ad.unpack_dual(value).tangent is not None:
                raise RuntimeError(
                    "forward-mode differentiation: got a dual number, expected reverse mode alone"
                )
    if torch.is_grad_enabled():
        for value in values:
            if value is not None and value.requires_grad:
                return True
    return False


def first_only(
    function: str, inputs: Callable[[Any], tuple[Tensor | None, ...]]
) -> Callable[[Backward], Backward]:
    """Decorate the backward of a `torch.autograd.Function` that has no derivative of its own.

    Args:
        function: name of the public function, for the error.
        inputs: returns the differentiable inputs of the forward, as forward was given them, from
            `ctx`: out of ``ctx.saved_tensors``, or kept by `keep_inputs`.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def once(ctx: Any, *grads: Tensor | None) -> Any:
            refuse_batches(*grads)
            # A compiled graph refuses second derivatives by itself.
            if is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, *grads)
            links = [x for x in (*grads, *inputs(ctx)) if x is not None and x.requires_grad]
            with torch.no_grad():
                results = backward(ctx, *grads)
            if not links:
                return results
            if isinstance(results, Tensor):
                return _Final.apply(function, results, *links)
            return tuple(
                _Final.apply(function, x, *links) if isinstance(x, Tensor) else x for x in results
            )

        return once

    return decorate


def refuse_batches(*grads: Tensor | None) -> None:
    """Raise in a backward that is given batches of upstream gradients, which no kernel takes."""
    if is_compiling():
        return
    for grad in grads:
        if grad is not None and any(is_batched(grad) for is_batched in _IS_BATCHED):
            raise RuntimeError(
                "is_grads_batched: got a batch of upstream gradients, expected one backward for "
                "each of them"
            )


def keep_inputs(ctx: Any, *inputs: Tensor | None) -> None:
    """Keep small inputs of a forward on `ctx` for `first_only`, as they came.

    They are not saved for backward, which would forbid the caller to change them in place.
    """
    if not is_compiling():
        ctx.kept_inputs = inputs


def kept_inputs(ctx: Any) -> tuple[Tensor | None, ...]:
    """Return what `keep_inputs` kept."""
    # A forward that was compiled kept none.
    inputs: tuple[Tensor | None, ...] = getattr(ctx, "kept_inputs", ())
    return inputs


def around_autograd(function: Any, *args: Any) -> tuple[Any, ...]:
    """Apply a `torch.autograd.Function` whose forward ends in `with_others`; return all it gives.

    Outputs without a gradient go around autograd, which would take half a microsecond for each. A
    compiler wants them as outputs. The last argument of forward is a list for them, or None.
    """
    if is_compiling():
        outputs: tuple[Any, ...] = function.apply(*args, None)
        return outputs
    others: list[Any] = []
    return (function.apply(*args, others), *others)


def with_others(
    ctx: Any, differentiable: Tensor, others: list[Any] | None, *constants: Tensor | None
) -> Any:
    """Return what forward returns: the one output with a gradient, and the others somehow."""
    if others is not None:
        others.extend(constants)
        return differentiable
    ctx.mark_non_differentiable(*[x for x in constants if x is not None])
    return differentiable, *constants


class _Final(torch.autograd.Function):
    """The identity, with a graph to `links` that ends in an error."""

    @staticmethod
    def forward(ctx: Any, function: str, value: Tensor, *links: Tensor) -> Tensor:
        ctx.function = function
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.function}: got a second derivative, expected first ones only: its gradient is a "
            "kernel's output, which cannot be differentiated (create_graph=True)"
        )
