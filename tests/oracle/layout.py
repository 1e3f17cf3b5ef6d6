"""Which tokens form which step, as lists: the oracle's own layouts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Sequence

from oracle.markers import marker_actions

Rows = list[list[int]]


@dataclasses.dataclass(frozen=True)
class OracleLayout:
    """The steps of a batch.

    Attributes:
        shape: token shape.
        rows: flat positions of each row.
        steps: flat positions of each step's tokens in time order.
        step_rows: row of each step; None where nothing says which.
        states: flat position whose value is that of the step; None where nothing says which.
        trajectories: steps of each trajectory in time order.
        timelines: flat positions of each trajectory in time order, action or not.
        homes: step that takes the reward of a position that is no action token.
    """

    shape: tuple[int, ...]
    rows: Rows
    steps: list[list[int]]
    step_rows: list[int | None]
    states: list[int | None]
    trajectories: list[list[int]]
    timelines: list[list[int]]
    homes: dict[int, int]

    @property
    def size(self) -> int:
        """Number of flat positions."""
        return _size(self.shape)

    @property
    def actions(self) -> list[int]:
        """Flat positions of all action tokens, step by step."""
        return [at for step in self.steps for at in step]

    @property
    def step_ids(self) -> list[int]:
        """Step of each position, -1 where no action token."""
        ids = [-1] * self.size
        for step, tokens in enumerate(self.steps):
            for at in tokens:
                ids[at] = step
        return ids

    @property
    def step_offsets(self) -> list[int]:
        """Bounds of each step in `actions`."""
        return _offsets(self.steps)

    @property
    def trajectory_offsets(self) -> list[int]:
        """Bounds of each trajectory in its list of steps."""
        return _offsets(self.trajectories)

    @property
    def trajectory_of(self) -> list[int | None]:
        """Trajectory of each step, None where it belongs to none."""
        found: list[int | None] = [None] * len(self.steps)
        for trajectory, steps in enumerate(self.trajectories):
            for step in steps:
                found[step] = trajectory
        return found

    # Constructors.

    @classmethod
    def from_mask(
        cls,
        mask: Sequence[bool],
        shape: tuple[int, ...],
        *,
        cu_seqlens: Sequence[int] | None = None,
        boundaries: Sequence[bool] | None = None,
    ) -> OracleLayout:
        """Make every run of ones in a row a step."""
        actions: list[Rows] = []
        rows = _rows(shape, cu_seqlens)
        for row in rows:
            runs: Rows = []
            for place, at in enumerate(row):
                if not mask[at]:
                    continue
                goes_on = place > 0 and mask[row[place - 1]]
                if goes_on and not (boundaries is not None and boundaries[at]):
                    runs[-1].append(at)
                else:
                    runs.append([at])
            actions.append(runs)
        return cls._of_rows(shape, rows, actions)

    @classmethod
    def from_step_ids(
        cls,
        step_ids: Sequence[int],
        shape: tuple[int, ...],
        *,
        cu_seqlens: Sequence[int] | None = None,
    ) -> OracleLayout:
        """Make the tokens of a row that share an id a step."""
        actions: list[Rows] = []
        rows = _rows(shape, cu_seqlens)
        for row in rows:
            by_id: dict[int, list[int]] = {}
            for at in row:
                if step_ids[at] >= 0:
                    by_id.setdefault(step_ids[at], []).append(at)
            actions.append([by_id[name] for name in sorted(by_id)])
        return cls._of_rows(shape, rows, actions)

    @classmethod
    def from_markers(
        cls,
        token_ids: Sequence[int],
        shape: tuple[int, ...],
        starts: Sequence[Sequence[int]],
        ends: Sequence[int],
        *,
        stops: Sequence[Sequence[int]] = (),
        valid: Sequence[bool] | None = None,
        cu_seqlens: Sequence[int] | None = None,
    ) -> OracleLayout:
        """Find the actions by the tokens around them."""
        rows = _rows(shape, cu_seqlens)
        actions = []
        for row in rows:
            real = None if valid is None else [valid[at] for at in row]
            found = marker_actions([token_ids[at] for at in row], starts, ends, stops, real)
            actions.append([[row[place] for place in action] for action in found])
        return cls._of_rows(shape, rows, actions)

    @classmethod
    def from_rows(
        cls,
        mask: Sequence[bool],
        shape: tuple[int, int],
        trajectory_ids: Sequence[Hashable],
        step_indices: Sequence[int],
        *,
        valid: Sequence[bool] | None = None,
    ) -> OracleLayout:
        """Make each row a step."""
        rows = _rows(shape, None)
        real = [True] * len(rows) if valid is None else list(valid)
        members: dict[Hashable, list[int]] = {}
        for row in range(len(rows)):
            if real[row]:
                members.setdefault(trajectory_ids[row], []).append(row)
        trajectories = [sorted(own, key=lambda row: step_indices[row]) for own in members.values()]
        steps = [[at for at in rows[row] if real[row] and mask[at]] for row in range(len(rows))]
        owned = {at for step in steps for at in step}
        homes = {at: row for own in trajectories for row in own for at in rows[row]}
        homes = {at: row for at, row in homes.items() if at not in owned}
        return cls(
            shape,
            rows,
            steps,
            list(range(len(rows))),
            [row[0] if row else None for row in rows],
            trajectories,
            [[at for row in own for at in rows[row]] for own in trajectories],
            homes,
        )

    @classmethod
    def _of_rows(cls, shape: tuple[int, ...], rows: Rows, actions: list[Rows]) -> OracleLayout:
        """Number the steps of all rows; every row is a trajectory."""
        steps: list[list[int]] = []
        step_rows: list[int | None] = []
        trajectories = []
        homes = {}
        for row, runs in enumerate(actions):
            numbers = list(range(len(steps), len(steps) + len(runs)))
            trajectories.append(numbers)
            steps += runs
            step_rows += [row] * len(runs)
            owner = {at: number for number, run in zip(numbers, runs, strict=True) for at in run}
            latest = numbers[0] if numbers else None
            for at in rows[row]:
                latest = owner.get(at, latest)
                if at not in owner and latest is not None:
                    homes[at] = latest
        states: list[int | None] = [step[0] for step in steps]
        return cls(shape, rows, steps, step_rows, states, trajectories, rows, homes)

    # Other views of the same batch.

    def per_token(self) -> OracleLayout:
        """Make every action token a step."""
        tokens = self.actions
        number = {at: step for step, at in enumerate(tokens)}
        row_of = {at: row for row, positions in enumerate(self.rows) for at in positions}
        trajectories = [
            [number[at] for s in own for at in self.steps[s]] for own in self.trajectories
        ]
        homes = {}
        for timeline in self.timelines:
            for at in timeline:
                if at in number:
                    continue
                home = self._nearest(self.rows[row_of[at]], at, number)
                if home is None:
                    home = self._nearest(timeline, at, number)
                if home is not None:
                    homes[at] = home
        return dataclasses.replace(
            self,
            steps=[[at] for at in tokens],
            step_rows=[row_of[at] for at in tokens],
            states=list(tokens),
            trajectories=trajectories,
            homes=homes,
        )

    @staticmethod
    def _nearest(line: list[int], at: int, number: dict[int, int]) -> int | None:
        """Return the last numbered position before one in a line, else the first, else None."""
        place = line.index(at)
        before = [number[other] for other in line[:place] if other in number]
        behind = [number[other] for other in line[place:] if other in number]
        return before[-1] if before else behind[0] if behind else None

    def per_trajectory(self) -> OracleLayout:
        """Make every trajectory a step."""
        row_of = {at: row for row, positions in enumerate(self.rows) for at in positions}
        steps = [[at for s in own for at in self.steps[s]] for own in self.trajectories]
        step_rows: list[int | None] = []
        states: list[int | None] = []
        homes = {}
        for number, own in enumerate(self.trajectories):
            if steps[number]:
                step_rows.append(row_of[steps[number][0]])
            else:
                step_rows.append(self.step_rows[own[0]] if own else None)
            states.append(self.states[own[0]] if own else None)
            homes.update(dict.fromkeys(self.timelines[number], number))
            for at in steps[number]:
                del homes[at]
        return dataclasses.replace(
            self,
            steps=steps,
            step_rows=step_rows,
            states=states,
            trajectories=[[number] if own else [] for number, own in enumerate(self.trajectories)],
            homes=homes,
        )

    def keep(self, mask: Sequence[bool]) -> OracleLayout:
        """Drop the tokens where a mask is False; steps keep their place, also without tokens."""
        row_of = {at: row for row, positions in enumerate(self.rows) for at in positions}
        steps = [[at for at in step if mask[at]] for step in self.steps]
        dropped = {
            at: number for number, step in enumerate(self.steps) for at in step if not mask[at]
        }
        step_rows = [
            row_of[step[0]] if step else row
            for step, row in zip(steps, self.step_rows, strict=True)
        ]
        return dataclasses.replace(
            self, steps=steps, step_rows=step_rows, homes={**self.homes, **dropped}
        )

    # Numbers that losses need.

    def weights(self, reduction: str) -> tuple[list[float], float]:
        """Return what a reduction multiplies the steps with, and its denominator."""
        lengths = [len(step) for step in self.steps]
        full = [sum(1 for step in own if lengths[step] > 0) for own in self.trajectories]
        if reduction == "step_mean":
            return [1.0] * len(lengths), float(sum(1 for length in lengths if length))
        if reduction == "trajectory_mean":
            weights = [
                0.0 if trajectory is None or not full[trajectory] else 1.0 / full[trajectory]
                for trajectory in self.trajectory_of
            ]
            return weights, float(sum(1 for count in full if count))
        if reduction == "token_mean":
            return [float(length) for length in lengths], float(sum(lengths))
        assert reduction == "sum"
        return [1.0] * len(lengths), 1.0


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _rows(shape: tuple[int, ...], cu_seqlens: Sequence[int] | None) -> Rows:
    """Return the flat positions of each row."""
    if cu_seqlens is not None:
        return [list(range(a, b)) for a, b in itertools.pairwise(cu_seqlens)]
    if len(shape) == 1:
        return [list(range(shape[0]))]
    count, width = shape
    return [list(range(row * width, (row + 1) * width)) for row in range(count)]


def _offsets(groups: list[list[int]]) -> list[int]:
    offsets = [0]
    for group in groups:
        offsets.append(offsets[-1] + len(group))
    return offsets
