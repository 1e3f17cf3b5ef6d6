"""The rows of verl's trainer as steps: their order in time, their rewards, their advantages."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...layout.step_layout import StepLayout
from ...losses.gae import step_gae
from ...outputs import StepAdvantages
from .trainer_config import StepPOTrainerConfig


@dataclass(frozen=True)
class Rows:
    """Rows of a batch and what verl knows them by.

    Attributes:
        keys: ``{uid}_{session}_{index}`` of each row: trajectory and place in time.
        is_padding: of each row, whether verl appended it to fill a mini-batch.
        mask: ``[B, R]``, the action tokens.
        extra_fields: of each row, what the agent loop left there; None if nothing is read of it.
    """

    keys: Sequence[str]
    is_padding: Sequence[bool]
    mask: Tensor
    extra_fields: Sequence[Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        wrong = [key for key in self.keys if not _ends_with_a_number(key)]
        if wrong:
            raise ValueError(
                f"keys: got {wrong[0]!r}, expected the trajectory and the index of the step, "
                "joined by '_'"
            )

    @property
    def trajectories(self) -> list[str]:
        """The name of each row's trajectory."""
        return [key.rpartition("_")[0] for key in self.keys]

    @property
    def indices(self) -> list[int]:
        """The place of each row in its trajectory; gaps are allowed."""
        return [int(key.rpartition("_")[2]) for key in self.keys]

    def marked(self, key: str | None) -> Tensor:
        """Return which rows have True under a key of their `extra_fields`, bool ``[B]``."""
        if key is None:
            return torch.zeros(len(self.keys), dtype=torch.bool, device="cpu")
        fields = self.extra_fields or [{}] * len(self.keys)
        # Padding is a copy of a row, with its fields.
        pairs = zip(fields, self.is_padding, strict=True)
        marks = [bool(field.get(key)) and not padding for field, padding in pairs]
        return torch.tensor(marks, dtype=torch.bool, device="cpu")

    def numbers(self, key: str, needed: Tensor) -> Tensor:
        """Return the number under a key of the `extra_fields` of the rows that need one, ``[B]``.

        Raises:
            ValueError: such a row has none.
        """
        found = torch.zeros(len(self.keys), dtype=torch.float32, device="cpu")
        for row in needed.nonzero().flatten().tolist():
            value = (self.extra_fields or [{}] * len(self.keys))[row].get(key)
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value):
                raise ValueError(
                    f"extra_fields: got {value!r} under {key!r} in row {self.keys[row]!r}, "
                    "expected the reward of the step, a finite number"
                )
            found[row] = float(value)
        return found


@dataclass(frozen=True)
class Steps:
    """The steps among the rows.

    Attributes:
        rows: all rows.
        layout: one step a row; padding and rows that only hold a state belong to no trajectory.
        is_step: bool ``[B]``, the rows that are steps.
        is_state: bool ``[B]``, the rows that hold the state after a trajectory that was cut off.
    """

    rows: Rows
    layout: StepLayout
    is_step: Tensor
    is_state: Tensor

    @classmethod
    def of_rows(cls, rows: Rows, bootstrap_key: str | None) -> Steps:
        """Find the steps.

        Raises:
            ValueError: a row that only holds a state has action tokens, or is not the last one of
                its trajectory; or a step stands in two rows.
        """
        is_state = rows.marked(bootstrap_key)
        is_step = ~is_state & ~torch.tensor(rows.is_padding, dtype=torch.bool, device="cpu")
        acting = is_state & rows.mask.bool().any(1)
        if bool(acting.any()):
            raise ValueError(
                f"response_mask: got action tokens in row {rows.keys[int(acting.nonzero()[0])]!r}, "
                "expected none: its extra_fields say that it holds a state after the last step"
            )
        layout = StepLayout.from_rows(rows.mask, rows.trajectories, rows.indices, valid=is_step)
        return cls(rows, layout, is_step, is_state)

    @property
    def last(self) -> Tensor:
        """The last step of each trajectory, int64 ``[G]``."""
        return self.layout.trajectory_steps[self.layout.trajectory_offsets[1:] - 1]

    def bootstrap_values(self, values: Tensor) -> Tensor:
        """Return the value after the last step of each trajectory, 0 where it ended, ``[G]``."""
        found = values.new_zeros(self.layout.num_trajectories)
        names, indices = self.rows.trajectories, self.rows.indices
        place = {names[row]: number for number, row in enumerate(self.last.tolist())}
        for row in self.is_state.nonzero().flatten().tolist():
            number = place.get(names[row])
            if number is None or indices[row] <= indices[int(self.last[number])]:
                raise ValueError(
                    f"extra_fields: got a state after the last step in row "
                    f"{self.rows.keys[row]!r}, expected it behind all steps of its trajectory"
                )
            found[number] = values[row]
        return found

    def rewards(self, scores: Tensor, config: StepPOTrainerConfig) -> Tensor:
        """Return the reward of each step, ``[B]``, of scores per row ``[B]``."""
        if config.rewards == "extra_fields":
            return self.rows.numbers(config.reward_key, self.is_step).to(scores.dtype)
        if config.rewards == "last":
            is_last = torch.zeros_like(self.is_step)
            is_last[self.last] = True
            return torch.where(is_last, scores, 0.0)
        return torch.where(self.is_step, scores, 0.0)

    def look_copied(self, rewards: Tensor) -> bool:
        """Whether the rows of each trajectory of several steps have one and the same reward.

        Some of these rewards have to differ from 0: outcomes of failures are no evidence.
        """
        offsets = self.layout.trajectory_offsets
        steps = self.layout.trajectory_steps
        by_trajectory = steps.tensor_split(offsets[1:-1].cpu()) if len(offsets) > 1 else ()
        several = [rewards[rows] for rows in by_trajectory if len(rows) > 1]
        are_equal = all(bool((x == x[0]).all()) for x in several)
        return are_equal and any(bool(x[0] != 0) for x in several)

    def look_whole(self) -> bool:
        """Whether each trajectory is one row, and some of these rows have several turns."""
        mask = self.rows.mask.bool()[self.is_step]
        starts = mask[:, 1:] & ~mask[:, :-1]
        turns = starts.sum(1) + mask[:, :1].sum(1)
        is_one_row = self.layout.num_trajectories == len(mask)
        return is_one_row and bool((turns > 1).any())

    def advantages(
        self, rewards: Tensor, values: Tensor, *, gamma: float, lam: float, whiten: bool
    ) -> StepAdvantages:
        """Return GAE over the steps of each trajectory, of rewards and values per row ``[B]``."""
        return step_gae(
            rewards,
            values,
            self.layout,
            gamma=gamma,
            lam=lam,
            bootstrap_values=self.bootstrap_values(values),
            whiten=whiten,
        )


def _ends_with_a_number(key: str) -> bool:
    trajectory, _, index = key.rpartition("_")
    return bool(trajectory) and index.isdecimal()
