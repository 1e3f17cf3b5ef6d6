"""Heads over kept sets, for tests that call the operators themselves."""

from __future__ import annotations

import torch
from kept_cases import mask_of, support_of

from steppo_kernels.backends import operators

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.half, "bf16": torch.bfloat16}
# Rounding of results, relative to the sum of the sizes of what is added up.
ROUND = {torch.float32: 2e-6, torch.float64: 1e-14, torch.half: 2e-3, torch.bfloat16: 1e-2}


def run(target, name, *args):
    """Run an operator on the device of a target."""
    moved = [x.to(target.device) if isinstance(x, torch.Tensor) else x for x in args]
    return operators.launcher(target.backend, name)(*moved)


def wide_of(dtype):
    return torch.promote_types(dtype, torch.float32)


class Head:
    """A head with kept sets, some of whose tokens a call is about."""

    def __init__(self, target, kind, dtype, size, tokens=9, vocabulary=23):
        mask = mask_of(kind, tokens, vocabulary)
        self.support = support_of(mask, target.device)._held
        self.mask, self.sets, self.index = mask, self.support.sets, self.support.by_id
        generator = torch.Generator().manual_seed(size)
        self.hidden = torch.randn((tokens, size), generator=generator).to(dtype)
        # Rows of the weight are further apart than they are long.
        rows = torch.randn((vocabulary, size + 3), generator=generator)
        self.weight, self.bias = rows.to(dtype)[:, :size], rows[:, -1].to(dtype).contiguous()
        if target.device != "cpu":
            self.weight = rows.to(target.device, dtype)[:, :size]
        self.rows = torch.arange(tokens)[torch.arange(tokens) % 4 != 2]
        self.grad = torch.randn((tokens, vocabulary), generator=generator).to(wide_of(dtype))
        # Some pairs have no gradient, and the hidden states of a token without one are not read.
        self.grad[:, ::3] = 0.0
        self.grad[2::4] = 0.0
        self.grad = torch.where(mask, self.grad, 0.0)
        self.pairs = self.grad[mask]

    @property
    def of_rows(self):
        return self.mask & torch.isin(torch.arange(len(self.mask)), self.rows)[:, None]
