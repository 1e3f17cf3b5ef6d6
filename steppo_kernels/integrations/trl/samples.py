"""The steps of one generation on all ranks, and what ranks exchange of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...layout.step_layout import StepLayout


@dataclass(frozen=True, eq=False)
class StepSamples:
    """The steps of one generation, of the completions of all ranks that have a score.

    Whoever estimates advantages is given this, and returns them ``[S]``. Every function of the
    package that takes a layout takes this one: its rows are completions, and its tokens are steps.

    Attributes:
        rewards: ``[S]``, as `step_reward_source` says.
        layout: which steps follow each other in a completion; a trajectory is a completion.
        groups: int64 ``[G]``, the group of each completion: those of one prompt.
        scores: ``[G]``, what reward functions gave each completion, weighted and summed; NaN where
            none gave anything.
        values: ``[S]``, of the states before the steps; None without a critic.

    Example:
        >>> from steppo_kernels import StepLayout, group_normalize, step_returns
        >>> def advantages(samples):
        ...     returns = step_returns(samples.rewards, samples.layout, gamma=1.0)
        ...     return group_normalize(returns, samples.groups, layout=samples.layout)
        >>> layout = StepLayout.from_mask(torch.ones(2, 2), boundaries=torch.ones(2, 2))
        >>> rewards, groups = torch.tensor([0.0, 1.0, 0.0, 3.0]), torch.zeros(2, dtype=torch.int64)
        >>> advantages(StepSamples(rewards, layout, groups, torch.tensor([1.0, 3.0]), None))
        tensor([-0.8660, -0.8660,  0.8660,  0.8660])
    """

    rewards: Tensor
    layout: StepLayout
    groups: Tensor
    scores: Tensor
    values: Tensor | None


class LocalSteps:
    """The steps of this rank's completions, and their places among those of all ranks.

    Attributes:
        layout: of the completions, ``[B, C]``.
        runs: how many steps each completion has.
    """

    def __init__(self, mask: Tensor) -> None:
        self.layout = StepLayout.from_mask(mask)
        counts = self.layout.trajectory_offsets.diff()
        self.runs: list[int] = counts.tolist()
        width = max(1, *self.runs)
        # True where a completion has its k-th step; row-major, as steps are numbered.
        self._valid = torch.arange(width, device=mask.device) < counts[:, None]

    def gather(
        self,
        rewards: list[list[float] | None],
        values: Tensor | None,
        scores: Tensor,
        num_generations: int,
        accelerator: Any,
    ) -> StepSamples:
        """Return the steps of all ranks. Every rank has to call it.

        Args:
            rewards: of the steps of each completion; None of one without a score.
            values: ``[S]`` of this rank, or None.
            scores: ``[G]`` of all ranks.
            num_generations: completions of a group, which follow each other.
            accelerator: that of the trainer.
        """
        device = self._valid.device
        # NaN marks that there is no step. Values are 0 where there is no critic.
        table = torch.full((*self._valid.shape, 2), torch.nan, dtype=torch.float32, device=device)
        for row, given in enumerate(rewards):
            if given is not None and self.runs[row]:
                table[row, : self.runs[row], 0] = torch.tensor(
                    given, dtype=table.dtype, device=device
                )
        table[..., 1][self._valid] = 0.0 if values is None else values.to(table)
        every = accelerator.gather(
            accelerator.pad_across_processes(table, dim=1, pad_index=torch.nan)
        )
        valid = ~every[..., 0].isnan()
        start = accelerator.process_index * len(table)
        self._own = slice(start, start + len(table))
        self._every = valid
        groups = torch.arange(len(every), device=device) // num_generations
        return StepSamples(
            rewards=every[..., 0][valid],
            layout=StepLayout.from_mask(valid, boundaries=valid),
            groups=groups,
            scores=scores,
            values=None if values is None else every[..., 1][valid],
        )

    def own(self, values: Tensor, missing: float) -> Tensor:
        """Return what this rank's steps have ``[S]``, of the numbers of all ranks' steps.

        Args:
            values: ``[S]`` in the order of the `StepSamples` that `gather` returned.
            missing: of a step of a completion without a score.
        """
        table = torch.full(self._every.shape, missing, dtype=values.dtype, device=values.device)
        table[self._every] = values
        return table[self._own, : self._valid.shape[1]][self._valid]
