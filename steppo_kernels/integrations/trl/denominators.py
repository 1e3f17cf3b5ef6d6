"""What the losses of the parts of an update are divided by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import Reduction
from ...layout.step_layout import StepLayout


def count_of(layout: StepLayout, reduction: Reduction) -> Tensor:
    """Return what one part adds to the denominator, 0-dim.

    The denominator of ``"sum"`` is 1, however many parts there are; a part adds nothing to it.
    """
    if reduction == "sum":
        return torch.zeros((), dtype=torch.float32, device=layout.device)
    return layout.reduction_weights(reduction)[1].to(torch.float32)


class Window(NamedTuple):
    """The parts of one update: micro-batches `start` to `stop`, on all ranks."""

    start: int
    stop: int


class Denominators:
    """Denominators of whole updates, for TRL's order of parts.

    Micro-batch t of a generation is part ``t % parts`` of it. Nothing is divided by the number of
    accumulated parts later, and gradients are averaged over ranks: each part is divided by the
    count of the whole update, over the number of ranks.

    An update may reach into the next generation, whose count nobody knows before. Its first parts
    are then divided by the count of what is known. When the next generation is there, the gradients
    that were accumulated are multiplied by the ratio of both counts.
    """

    def __init__(self, reduction: Reduction, num_ranks: int) -> None:
        self._reduction, self._num_ranks = reduction, num_ranks
        self._counts: Sequence[float] = ()
        self._window = Window(0, 0)
        self._total = 0.0
        # The first micro-batch after those of this generation.
        self._generation_stop = 0

    def begin_generation(self, counts: Sequence[float], step: int, period: int) -> None:
        """Take the counts of the parts of a new generation.

        Args:
            counts: of each part, over all ranks.
            step: the micro-batch that it begins with.
            period: after how many micro-batches TRL generates anew, counted from the first of all.
        """
        self._counts = counts
        self._generation_stop = (step // period + 1) * period

    def at(self, step: int, accumulation: int, *, is_new: bool) -> tuple[float, float]:
        """Return the normalizer of a micro-batch, and what accumulated gradients are multiplied by.

        Args:
            step: its number, from the beginning of the training.
            accumulation: the parts of the update that it belongs to.
            is_new: whether a generation begins with it.
        """
        scale = 1.0
        if step >= self._window.stop:
            self._window = Window(step, step + accumulation)
            self._total = self._sum(step)
        elif is_new:
            before, self._total = self._total, self._total + self._sum(step)
            # Parts that hold no step have no gradient to be scaled.
            scale = before / self._total if self._total else 1.0
        if self._reduction == "sum":
            return 1.0 / self._num_ranks, 1.0
        return self._total / self._num_ranks, scale

    def _sum(self, step: int) -> float:
        """Return the count of the parts from here on that are of this update and generation."""
        stop = min(self._window.stop, self._generation_stop)
        return sum(self._counts[part % len(self._counts)] for part in range(step, stop))
