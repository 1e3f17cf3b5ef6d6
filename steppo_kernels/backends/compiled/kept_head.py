"""Products of the output head with the rows of the weight that are kept, in compiled code."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..records import IdIndex, Sets, record
from .launch import DTYPES, Native, addresses, start

# The record ``IdIndex`` where there is none.
_NO_INDEX = (0,) * 12


def kept_logits(
    native: Native,
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    sets: Sequence[Tensor],
    by_id: Sequence[Tensor],
) -> None:
    """Run the operator `kept_logits` of `steppo_kernels.backends.kept_operators`."""
    held, index = record(Sets, sets), record(IdIndex, by_id).fields if by_id else _NO_INDEX
    weight_stride, num_rows, size = weight.stride(0), rows.numel(), hidden.shape[1]
    product = (
        DTYPES[hidden.dtype],
        *addresses(hidden),
        start(weight),
        weight_stride,
        *addresses(bias, rows),
        num_rows,
        size,
        *addresses(logits),
    )
    native.kernels.kept_logits(product, held.fields, index, native.place(logits))


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
