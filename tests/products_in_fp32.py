"""torch's products of halves into fp32, which only a GPU has, on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steppo_kernels.backends.gpu import products

HALVES = (torch.bfloat16, torch.float16)


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `torch.mm` and `torch.addmm` take `out_dtype` on a CPU, with an `out` of that dtype.

    What is added has that dtype too, and is a matrix like `out` or a row. A GPU does as it does.
    """
    mm, addmm = torch.mm, torch.addmm
    answers = products.adds_products, products.adds_rows

    def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        assert left.dtype == right.dtype
        assert left.dtype in HALVES
        assert out.dtype == torch.float32
        return mm(left.float(), right.float())

    def mm_into(left, right, *, out=None, **options):
        if left.is_cuda or not options:
            return mm(left, right, out=out, **options)
        assert options == {"out_dtype": out.dtype}
        return out.copy_(product(left, right, out))

    def addmm_into(addend, left, right, *, out=None, **options):
        if left.is_cuda or "out_dtype" not in options:
            return addmm(addend, left, right, out=out, **options)
        assert options == {"out_dtype": out.dtype}
        assert addend.dtype == out.dtype
        assert addend.shape in (out.shape, out.shape[1:])
        return out.copy_(addend + product(left, right, out))

    monkeypatch.setattr(torch, "mm", mm_into)
    monkeypatch.setattr(torch, "addmm", addmm_into)
    for answer in answers:

        def answered(device: torch.device, dtype: torch.dtype, _answer=answer) -> bool:
            return device.type == "cpu" or _answer(device, dtype)

        monkeypatch.setattr(products, answer.__name__, answered)
