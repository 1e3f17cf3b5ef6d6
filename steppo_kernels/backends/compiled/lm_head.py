"""Logits of the output head on a CPU: torch's product, or ours where torch's would round."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import DTYPES, Native, addresses, start

# Rows of the weight that are converted at a time where no kernel multiplies bf16 into fp32.
_SLICE = 4096


def head_logits(
    native: Native, logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    """Run the operator `head_logits` of `steppo_kernels.backends.operators`."""
    num_rows, size = hidden.shape
    if logits.dtype == hidden.dtype:
        if bias is None:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden, weight.t(), out=logits)
    elif (
        hidden.dtype == torch.bfloat16
        and size % 2 == weight.stride(0) % 2 == 0
        and weight.stride(1) == 1
        and native.kernels.multiplies_bf16()
    ):
        bias = None if bias is None else bias.float()
        weight_stride, vocabulary = weight.stride(0), len(weight)
        head = (
            *addresses(hidden),
            start(weight),
            weight_stride,
            *addresses(bias),
            num_rows,
            size,
            vocabulary,
            *addresses(logits),
        )
        native.kernels.head_logits(head, native.place(logits))
    else:
        hidden = hidden.float()
        for part, columns in zip(weight.split(_SLICE), logits.split(_SLICE, 1), strict=True):
            torch.mm(hidden, part.float().t(), out=columns)
        if bias is not None:
            logits += bias


def accumulate(native: Native, total: Tensor, product: Tensor, is_first: bool) -> None:
    """Run the operator `accumulate` of `steppo_kernels.backends.operators`."""
    count = total.numel()
    accumulation = (
        DTYPES[product.dtype],
        *addresses(product),
        is_first,
        count,
        *addresses(total),
    )
    native.kernels.accumulate(accumulation, native.place(total))
