"""Random numbers for a composition, each as a tensor and as the list that the oracle reads."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")

GARBAGE = (math.nan, math.inf, -math.inf, 3e38)


class Numbers(NamedTuple):
    """Values as a tensor and, exactly those, as flat floats."""

    tensor: torch.Tensor
    flat: list[float]

    def leaf(self) -> torch.Tensor:
        """Return a copy of the tensor that wants a gradient."""
        return self.tensor.clone().requires_grad_()


class Draw:
    """One composition's source of chance.

    Attributes:
        words: what was chosen, for the message of a failure.
        dtype: dtype of the computation.
        half: dtype of the differentiated inputs, `dtype` or one of 16 bits.
    """

    def __init__(self, seed: int, size: int, device: str) -> None:
        self.rng = random.Random(seed)
        self.size = size
        self.device = device
        self.words: list[str] = []
        self.dtype = self.named("dtype", [torch.float64, torch.float64, torch.float32])
        self.half = self.dtype
        if self.dtype is torch.float32 and self.chance(0.3):
            self.half = self.named("inputs", [torch.float16, torch.bfloat16])

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def named(self, name: str, options: Iterable[T]) -> T:
        """Choose one and note it."""
        chosen = self.rng.choice(list(options))
        self.words.append(f"{name}={chosen}")
        return chosen

    def number(self, low: float, high: float) -> float:
        return self.rng.uniform(low, high)

    def floats(self, count: int, low: float, high: float) -> list[float]:
        return [self.rng.uniform(low, high) for _ in range(count)]

    def some_zero(self, count: int) -> list[float]:
        """Return weights in [0, 2], of which some are 0 now and then."""
        share = self.rng.choice([0.0, 0.0, 0.4])
        return [0.0 if self.chance(share) else self.number(0, 2) for _ in range(count)]

    def flags(self, count: int, share: float) -> list[bool]:
        return [self.rng.random() < share for _ in range(count)]

    def numbers(
        self, flat: list[float], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Numbers:
        """Return values in a dtype, and what rounding to it left of them."""
        tensor = torch.tensor(flat, dtype=torch.float64).reshape(shape)
        tensor = tensor.to(self.dtype if dtype is None else dtype)
        return Numbers(tensor.to(self.device), tensor.double().flatten().tolist())

    def uniform(
        self, shape: tuple[int, ...], low: float, high: float, dtype: torch.dtype | None = None
    ) -> Numbers:
        return self.numbers(self.floats(math.prod(shape), low, high), shape, dtype)

    def spoiled(self, flat: list[float], used: Iterable[int]) -> list[float]:
        """Put garbage where nothing may be read; half of the calls leave all as it is."""
        if self.chance(0.5):
            return flat
        known = set(used)
        return [value if at in known else self.rng.choice(GARBAGE) for at, value in enumerate(flat)]

    def view(self, shape: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Choose one of the forms in which a tensor of the token shape may be given."""
        count = math.prod(shape)
        forms = [shape, shape, shape, (count,), (1, *shape)]
        if len(shape) == 2:
            forms.append((shape[0], 1, shape[1]))
        form = self.rng.choice(forms)
        if form != shape:
            self.words.append(f"given as {form}")
        return lambda tensor: tensor.reshape(*form, *tensor.shape[len(shape) :])

    def strided(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the same values, in one of a few places in memory."""
        way = self.rng.randrange(6)
        if way == 0 and tensor.dim() >= 2:
            self.words.append("transposed")
            return tensor.transpose(0, 1).contiguous().transpose(0, 1)
        if way == 1 and tensor.dim() >= 1:
            self.words.append("sliced")
            wide = torch.cat([tensor, torch.full_like(tensor[:1], 7)], 0)
            wide = torch.stack([wide, wide + 1], -1)[..., 0]
            return wide[: tensor.shape[0]]
        return tensor
