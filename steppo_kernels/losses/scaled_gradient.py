"""What backward does where forward has formed the gradient: it takes the upstream one in."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks
from ..backends import operators

# Whether the running backward was called with retain_graph; a torch without the answer says yes.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def scaled_gradient(
    backend: str,
    grad: Tensor | None,
    upstream: Tensor,
    scale: Tensor | None,
    shape: torch.Size,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return a saved gradient times one or two 0-dim factors, in the shape and dtype of its input.

    None, which is of an input that wants no gradient, stays None.
    What is exactly 0, as it is at masked tokens, stays so, whatever the factors are. If this is the
    last use of the saved tensor, it is multiplied in place and given away. On the CPU the factors
    can be looked at without waiting, and in a plain ``loss.backward()`` they are 1: then there is
    nothing to do.
    """
    if grad is None:
        return None
    is_last = not is_compiling() and not _keeps_graph()
    # A compiled graph has an empty tensor for None.
    scale = scale if scale is not None and scale.numel() else None
    # The kernel takes what is contiguous: a head may have strided hidden states.
    if backend == "cuda" and grad.is_contiguous():
        # It writes what it reads, or halves of fp32.
        is_written = dtype is grad.dtype or (
            grad.dtype is torch.float32 and dtype in checks.HALF_DTYPES
        )
        made = dtype if is_written else grad.dtype
        is_given_away = is_last and made is grad.dtype
        out = grad if is_given_away else grad.new_empty(grad.shape, dtype=made)
        operators.call("scale_gradient", backend, out, grad, upstream.resolve_neg(), scale)
        return out.view(shape).to(dtype)
    is_seen = not is_compiling() and grad.is_cpu
    factor = upstream if scale is None else upstream * scale
    seen = factor.item() if is_seen else math.nan
    if not (is_last and seen == 1.0):
        zeros = None if math.isfinite(seen) else grad == 0
        grad = grad.mul_(factor) if is_last else grad * factor
        if zeros is not None:
            grad = grad.masked_fill_(zeros, 0.0)
    if grad.shape != shape:
        grad = grad.view(shape)
    return grad if grad.dtype is dtype else grad.to(dtype)
