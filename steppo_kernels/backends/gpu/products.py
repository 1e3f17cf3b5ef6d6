"""Products of halves that a GPU sums in fp32 and does not round, as far as torch forms them.

torch has them since 2.8, though not in every build for ROCm. With something added to the product it
refused an addend in fp32 at first, and was wrong for a while: small products tell what it does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

KEEPS_FP32 = torch.version.hip is None and "dtype_out" in torch.ops.aten.mm.overloads()


def multiply(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
    """Write a product of halves, plus `bias` in every row, to fp32."""
    if bias is not None and adds_rows(left.device, left.dtype):
        _add_row(out, left, right, bias)
        return
    torch.mm(left, right, out_dtype=out.dtype, out=out)
    if bias is not None:
        out += bias


def add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product of halves to fp32, which takes `adds_products`."""
    torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _add_row(out: Tensor, left: Tensor, right: Tensor, row: Tensor) -> None:
    # The library adds it before it writes the product. Afterwards would be one more walk over both.
    torch.addmm(row.to(out.dtype), left, right, out_dtype=out.dtype, out=out)


@functools.cache
def adds_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `add` is right on a GPU. The host waits once for the answer."""
    return KEEPS_FP32 and is_exact_sum(add, device, dtype)


@functools.cache
def adds_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a GPU adds a row to a product rightly. The host waits once for the answer."""
    return KEEPS_FP32 and is_exact_row(_add_row, device, dtype)


def is_exact_sum(
    run: Callable[[Tensor, Tensor, Tensor], None], device: torch.device, dtype: torch.dtype
) -> bool:
    """Return whether `run` adds the product of strided and contiguous halves to fp32."""
    # Gradients of logits lie as these do: turned, and in the first half of memory for fp32.
    left = _integers((24, 96), 37, device, dtype)[:, :48].t()
    right = _integers((24, 40), 53, device, dtype)
    total = _integers((48, 40), 71, device, torch.float32) * 1023
    exact = total.double() + left.double() @ right.double()
    return _gives(exact, [total], lambda: run(total, left, right))


def is_exact_row(
    run: Callable[[Tensor, Tensor, Tensor, Tensor], None], device: torch.device, dtype: torch.dtype
) -> bool:
    """Return whether `run` writes a product of halves plus a row to fp32."""
    left = _integers((48, 24), 37, device, dtype)
    right = _integers((40, 24), 53, device, dtype).t()
    row = _integers((40,), 71, device, dtype)
    # Libraries add the row in another way where rows of the product are padded, as logits are.
    outs = [
        torch.full((48, width), torch.nan, dtype=torch.float32, device=device)[:, :40]
        for width in (40, 44)
    ]
    exact = left.double() @ right.double() + row.double()

    def run_all() -> None:
        for out in outs:
            run(out, left, right, row)

    return _gives(exact, outs, run_all)


def _integers(
    shape: tuple[int, ...], step: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return integers up to 63, whose products add up to what fp32 holds and halves do not.

    Sums are then exact in any order.
    """
    count = torch.Size(shape).numel()
    return (torch.arange(count, device=device) * step % 127 - 63).to(dtype).view(shape)


def _gives(exact: Tensor, found: list[Tensor], run: Callable[[], None]) -> bool:
    """Return whether a call that writes to all of `found` gives exact numbers."""
    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return False
    return torch.equal(torch.stack(found).double(), exact.expand(len(found), *exact.shape))
