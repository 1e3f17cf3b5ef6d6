"""Gradients of the output head over kept sets, in compiled code."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..records import IdIndex, Sets, record
from .launch import DTYPES, Native, addresses, start


def scale_directions(
    native: Native,
    grad_hidden: Tensor,
    directions: Tensor,
    grad_log_probs: Tensor,
    rows: Tensor,
) -> None:
    """Run the operator `scale_directions` of `steppo_kernels.backends.kept_operators`."""
    grad, num_rows, size = grad_log_probs, rows.numel(), directions.shape[1]
    scaling = (
        DTYPES[grad_hidden.dtype],
        *addresses(directions, grad, rows),
        num_rows,
        size,
        *addresses(grad_hidden),
    )
    native.kernels.scale_directions(scaling, native.place(grad_hidden))


def kept_hidden_gradient(
    native: Native,
    grad_hidden: Tensor,
    grad_logits: Tensor,
    weight: Tensor,
    rows: Tensor,
    sets: Sequence[Tensor],
) -> None:
    """Run the operator `kept_hidden_gradient` of `steppo_kernels.backends.kept_operators`."""
    held = record(Sets, sets)
    dtype, grad_dtype = DTYPES[weight.dtype], DTYPES[grad_hidden.dtype]
    weight_stride, num_rows, size = weight.stride(0), rows.numel(), weight.shape[1]
    product = (
        dtype,
        grad_dtype,
        *addresses(grad_logits),
        start(weight),
        weight_stride,
        *addresses(rows),
        num_rows,
        size,
        *addresses(grad_hidden),
    )
    native.kernels.kept_hidden_gradient(product, held.fields, native.place(grad_hidden))


def kept_weight_gradient(
    native: Native,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    grad_logits: Tensor,
    hidden: Tensor,
    by_id: Sequence[Tensor],
    compact: bool,
) -> None:
    """Run the operator `kept_weight_gradient` of `steppo_kernels.backends.kept_operators`."""
    held = record(IdIndex, by_id)
    sums, size, num_rows = held.new_sums(hidden), hidden.shape[1], len(grad_weight)
    if not (compact or native.is_done):
        grad_weight.zero_()
        if grad_bias is not None:
            grad_bias.zero_()
    product = (
        DTYPES[hidden.dtype],
        *addresses(grad_logits, hidden),
        size,
        compact,
        *addresses(sums),
        num_rows,
        *addresses(grad_weight, grad_bias),
    )
    native.kernels.kept_weight_gradient(product, held.fields, native.place(grad_weight))
