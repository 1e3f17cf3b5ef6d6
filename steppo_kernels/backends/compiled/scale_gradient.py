"""A saved gradient times what came later, in one launch."""

from __future__ import annotations

from torch import Tensor

from .launch import DTYPES, Native, addresses


def scale_gradient(
    native: Native, out: Tensor, grad: Tensor, upstream: Tensor, scale: Tensor | None
) -> None:
    """Run the operator `scale_gradient` of `steppo_kernels.backends.operators`."""
    count = grad.numel()
    grad_dtype, out_dtype = DTYPES[grad.dtype], DTYPES[out.dtype]
    upstream_dtype = DTYPES[upstream.dtype]
    scaling = (
        grad_dtype,
        out_dtype,
        upstream_dtype,
        *addresses(grad, upstream, scale),
        count,
        *addresses(out),
    )
    native.kernels.scale_gradient(scaling, native.place(grad))
