"""How close a result must be to the oracle's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

# In fp64 sums are taken in another order; the others lose what their rounding loses.
_EPS = {torch.float64: 2e-12, torch.float32: 6e-8, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def near(
    name: str,
    got: torch.Tensor,
    want: Sequence[float],
    *,
    dtype: torch.dtype,
    condition: float = 1.0,
    scale: float | None = None,
    size: float = 0.0,
    zeros: bool = False,
) -> None:
    """Compare a tensor with floats, NaN with NaN and infinity with infinity.

    Args:
        name: for the message.
        got: any shape.
        want: as many floats.
        dtype: the coarsest dtype that the computation rounds to.
        condition: by how much the computation may enlarge a rounding error.
        scale: size of the terms that were summed, by default the largest entry of `want`.
        size: of the terms of an entry, where they may cancel.
        zeros: where 0 is wanted, nothing else will do.
    """
    found = got.detach().double().flatten().tolist()
    assert len(found) == len(want), (name, tuple(got.shape), len(want))
    finite = [abs(value) for value in want if math.isfinite(value)]
    largest = max(size, max(finite, default=0.0) if scale is None else scale)
    # A number of the result's own dtype is as coarse as the smallest that the dtype has.
    smallest = torch.finfo(got.dtype).smallest_normal if got.dtype.is_floating_point else 0.0
    bound = 16 * _EPS[dtype] * condition
    for at, (one, two) in enumerate(zip(found, want, strict=True)):
        if not math.isfinite(two):
            fits = one == two or (math.isnan(one) and math.isnan(two))
        elif zeros and two == 0:
            fits = one == 0
        else:
            fits = abs(one - two) <= bound * max(abs(two), largest) + smallest
        assert fits, (
            f"{name}: entry {at} is {one!r}, expected {two!r} (all: {found} / {list(want)})"
        )
