"""Logits of the output head on a GPU: torch's product."""

from __future__ import annotations

import torch
from torch import Tensor

from . import products


def head_logits(logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Run the operator `head_logits` of `steppo_kernels.backends.operators`."""
    if logits.dtype == hidden.dtype:
        if bias is None:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden, weight.t(), out=logits)
        return
    if hidden.is_cuda:
        products.multiply(logits, hidden, weight.t(), bias)
        return
    torch.mm(hidden.to(logits.dtype), weight.to(logits.dtype).t(), out=logits)
    if bias is not None:
        logits += bias


def accumulate(total: Tensor, product: Tensor, is_first: bool) -> None:
    """Run the operator `accumulate` of `steppo_kernels.backends.operators`."""
    if is_first:
        total.copy_(product)
    else:
        total += product
