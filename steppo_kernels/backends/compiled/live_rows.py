"""The rows with a gradient, by compiled code."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import DTYPES, Native, addresses, empty


def order_live_rows(
    native: Native, grad_log_probs: Tensor, grad_entropy: Tensor | None, ascending: bool
) -> tuple[Tensor, Tensor]:
    """Run the operator `order_live_rows` of `steppo_kernels.backends.operators`."""
    num_rows = grad_log_probs.numel()
    order = empty(grad_log_probs, num_rows, torch.int64)
    count = empty(grad_log_probs, (), torch.int64)
    rows = (
        DTYPES[grad_log_probs.dtype],
        *addresses(grad_log_probs, grad_entropy),
        ascending,
        num_rows,
        *addresses(order, count),
    )
    native.kernels.order_live_rows(rows, native.place(grad_log_probs))
    return order, count
