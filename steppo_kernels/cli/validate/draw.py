"""Random ragged batches, rounded to the dtype under test."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_KINDS = (
    "ragged",
    "long steps",
    "many rows",
    "no action",
    "single tokens",
    "all action",
    "one step",
    "ragged",
)


class Draw:
    """The random choices of one problem: the same for a seed, whatever else is checked.

    Args:
        seed: of the whole validation.
        name: of the case.
        batch: number of the batch; batches take turns in kinds, so that the rare ones (no action
            token at all, a single step) come up for sure.
        dtype: floating tensors are rounded to it.
        device: where tensors go. The numbers do not depend on it.
        small: keep to sizes that an interpreter of kernels manages.
    """

    def __init__(
        self,
        seed: int,
        name: str,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        small: bool = False,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._kind = _KINDS[batch % len(_KINDS)]
        self._small = small
        self._generator = torch.Generator().manual_seed(
            zlib.crc32(f"{seed} {name} {batch}".encode())
        )

    def integer(self, low: int, high: int) -> int:
        """Return a number from `low` to `high`, both included."""
        return int(torch.randint(low, high + 1, (), generator=self._generator))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Return int64 numbers from `low` to `high`, both included."""
        return torch.randint(low, high + 1, shape, generator=self._generator).to(self.device)

    def choice(self, options: Sequence[T]) -> T:
        """Return one of `options`."""
        return options[self.integer(0, len(options) - 1)]

    def permutation(self, length: int) -> Tensor:
        """Return 0 .. `length` - 1 in random order."""
        return torch.randperm(length, generator=self._generator).to(self.device)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Return fp64 numbers between `low` and `high`."""
        drawn = torch.rand(shape, dtype=torch.float64, generator=self._generator)
        return (low + (high - low) * drawn).to(self.device)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal fp64 numbers."""
        drawn = torch.randn(shape, dtype=torch.float64, generator=self._generator)
        return drawn.to(self.device)

    def flags(self, share: float, *shape: int) -> Tensor:
        """Return bool, True for about `share` of the entries."""
        return self.uniform(0.0, 1.0, *shape) < share

    def rounded(self, values: Tensor) -> Tensor:
        """Return fp64 `values` in the dtype under test."""
        return values.to(self.dtype)

    def upstream(self) -> float:
        """Return the gradient of a loss, scaled as trainers do where fp16 would underflow."""
        return self.choice((1.0, -0.7)) * (256.0 if self.dtype == torch.float16 else 1.0)

    def mask(self) -> Tensor:
        """Return a bool ``[B, T]`` action mask, ragged in the way of this batch's kind."""
        rows, length, mean_step = self.integer(2, 8), self.integer(16, 96), 6.0
        if self._kind == "long steps":
            rows, length, mean_step = self.integer(1, 3), self.integer(600, 2500), 150.0
        elif self._kind == "many rows":
            rows, length, mean_step = self.integer(60, 400), self.integer(1, 9), 3.0
        elif self._kind == "single tokens":
            mean_step = 1.2
        elif self._kind == "no action":
            length = self.choice((0, length))
        if self._small:
            rows, length, mean_step = min(rows, 8), min(length, 160), min(mean_step, 40.0)
        if self._kind == "all action":
            mask = torch.ones((rows, length), dtype=torch.bool)
        elif self._kind == "no action":
            mask = torch.zeros((rows, length), dtype=torch.bool)
        elif self._kind == "one step":
            mask = torch.zeros((rows, length), dtype=torch.bool)
            first = self.integer(0, length - 1)
            mask[self.integer(0, rows - 1), first : self.integer(first + 1, length)] = True
        else:
            mask = ragged_mask(rows, length, mean_step=mean_step, generator=self._generator)
        return mask.to(self.device)


def more_batches(batches: int, count: int) -> list[int]:
    """Return the numbers of `count` batches beyond the first `batches`, of the kinds of these."""
    kinds = len(_KINDS)
    first, taken = -(-batches // kinds) * kinds, min(batches, kinds)
    return [first + i // taken * kinds + i % taken for i in range(count)]


def border(values: Tensor, beyond: float, default: float, *, least: float) -> float:
    """Return a number above `beyond` that no entry of `values` is near to.

    It lies in the middle of the widest gap in the upper half of the values beyond `beyond`, so
    that there are values on both sides. A gap narrower than `least` is not trusted: then, and
    without values beyond, the number is above them all.
    """
    points = torch.cat((values.new_full((1,), beyond), values[values > beyond].sort().values))
    if points.numel() == 1:
        return default
    half = points[(points.numel() - 1) // 2 :]
    gaps = half.diff()
    widest = int(gaps.argmax())
    if float(gaps[widest]) < least:
        return max(default, 2 * float(points[-1]) - beyond + least)
    return float(half[widest : widest + 2].mean())


def ragged_mask(
    rows: int, length: int, *, mean_step: float = 6.0, generator: torch.Generator | None = None
) -> Tensor:
    """Return a bool ``[rows, length]`` mask of runs and gaps of random lengths from 1 up.

    Every seventh row has no action token. Some rows begin or end inside a run.
    """
    # Enough pieces to fill a row even if all of them have length 1.
    pieces = length + 1
    draws = torch.rand((rows, pieces), dtype=torch.float64, generator=generator)
    ends = (1 + (-torch.log1p(-draws) * (mean_step - 1)).floor()).cumsum(1)
    position = torch.arange(length, dtype=torch.float64).expand(rows, length).contiguous()
    piece = torch.searchsorted(ends, position, right=True)
    phase = torch.randint(2, (rows, 1), generator=generator)
    mask = (piece + phase) % 2 == 0
    mask[6::7] = False
    return mask
