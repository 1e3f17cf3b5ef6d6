"""Central differences, which the gradients of the oracle are held to."""

from __future__ import annotations

import random
from collections.abc import Callable

_STEP = 1e-6


def differences(function: Callable[[list[float]], float], at: list[float]) -> list[float]:
    """Return the slope of a function in each of its numbers."""
    slopes = []
    for place in range(len(at)):
        above, below = list(at), list(at)
        above[place] += _STEP
        below[place] -= _STEP
        slopes.append((function(above) - function(below)) / (2 * _STEP))
    return slopes


def floats(seed: int, low: float, high: float, count: int = 12) -> list[float]:
    """Draw numbers."""
    chance = random.Random(seed)
    return [chance.uniform(low, high) for _ in range(count)]
