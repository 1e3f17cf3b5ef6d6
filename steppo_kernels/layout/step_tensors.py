"""The tensors of a layout, as its constructors make them and as the kernels read them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes

from ..backends.records import States, Steps, Timeline, kept

# What follows from the others, and is neither shown nor saved.
DERIVED = ("step_starts", "along_rows")


class _StepTensors(NamedTuple):
    step_ids: Tensor
    token_index: Tensor
    step_offsets: Tensor
    step_lengths: Tensor
    step_starts: Tensor
    trajectory_steps: Tensor
    trajectory_offsets: Tensor
    trajectory_counts: Tensor
    state_index: Tensor
    step_rows: Tensor
    row_offsets: Tensor
    reward_index: Tensor | None = None
    reward_offsets: Tensor | None = None
    along_rows: bool = False


class StepTensors(_StepTensors):
    """What a `StepLayout` holds. Only the package sees these tensors, so nothing changes them.

    N tokens (flat positions are row-major), M action tokens, S steps, G trajectories, R rows.

    Attributes:
        step_ids: int32 of the token shape: step of each token, -1 where no action token.
        token_index: int64 ``[M]``: flat positions of the action tokens, step by step.
        step_offsets: int64 ``[S + 1]``: where the steps begin in `token_index`.
        step_lengths: int32 ``[S]``.
        step_starts: int64 ``[S]``: the first position of a step whose positions follow each other;
            -1 of any other step, and of an empty one.
        trajectory_steps: int64 ``[K]``: steps of the trajectories, each in time order.
        trajectory_offsets: int64 ``[G + 1]``: where the trajectories begin in `trajectory_steps`.
        trajectory_counts: int32 ``[S]``: number of non-empty steps in the step's trajectory.
        state_index: int64 ``[S]``: flat position of the value of the state before the step.
        step_rows: int64 ``[S]``: row of the step's first token; of an empty step, its own row.
        row_offsets: int64 ``[R + 1]``: flat positions where rows begin.
        reward_index: int64 ``[P]`` or None: flat positions, action tokens or not, whose rewards the
            steps take, step by step and in time order. None: a reward on a token that is no
            action's goes to the latest step before it in its row, else to the first one.
        reward_offsets: int64 ``[S + 1]`` or None: where the steps begin in `reward_index`.
        along_rows: whether there is a trajectory for each row, which is all steps with tokens in
            it. They have none elsewhere, numbers that follow each other in their order there, and
            their states at their first tokens; `reward_index` is None. Kernels may then go along
            rows. It is False where nobody has looked.
    """

    @kept
    def shape(self) -> torch.Size:
        """The token shape."""
        return self.step_ids.shape

    @kept
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.step_ids.device

    @kept
    def num_steps(self) -> int:
        """S, empty steps included."""
        return self.step_lengths.shape[0]

    def is_action(self) -> Tensor:
        """Return whether each of the N tokens is an action token: bool ``[N]``.

        It is made when it is first asked for, and kept. On a GPU each stream has its own: no other
        one waits until it is there. What a graph captures is made anew in every replay, and is
        not kept.
        """
        if is_compiling():
            return (self.step_ids >= 0).view(-1)
        held: dict[int, Tensor] = self.__dict__.setdefault("_is_action", {})
        on_gpu = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device).cuda_stream if on_gpu else 0
        if stream in held:
            return held[stream]
        # It outlives the modes that are on now.
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            made = (self.step_ids >= 0).view(-1)
        if not (on_gpu and torch.cuda.is_current_stream_capturing()):
            held[stream] = made
        return made

    @property
    def num_tokens(self) -> int:
        """M."""
        return self.token_index.shape[0]

    @property
    def num_trajectories(self) -> int:
        """G."""
        return self.trajectory_offsets.shape[0] - 1

    @kept
    def steps(self) -> Steps:
        """Which tokens form which step, as operators take it."""
        return Steps(
            self.step_ids,
            self.token_index,
            self.step_offsets,
            self.step_starts,
            self.trajectory_counts,
        )

    @kept
    def timeline(self) -> Timeline:
        """The order of the steps in time, as operators take it."""
        return Timeline(
            self.step_ids,
            self.step_offsets,
            self.step_starts,
            self.row_offsets,
            self.state_index,
            self.trajectory_steps,
            self.trajectory_offsets,
        )

    @kept
    def states(self) -> States:
        """The states before the steps, as operators take them."""
        return States(self.state_index, self.step_lengths, self.trajectory_counts)

    def by_name(self) -> dict[str, Tensor]:
        """Return the tensors that make it up, by name."""
        return {
            name: value
            for name, value in self._asdict().items()
            if value is not None and name not in DERIVED
        }

    def to(self, device: torch.device, non_blocking: bool) -> StepTensors:
        """Return them on `device`."""
        moved = (
            value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
            for value in self
        )
        return StepTensors(*moved)  # type: ignore[arg-type]

    def _replace(self, **others: Any) -> StepTensors:
        """Return them with others in their places. Who knows that these go along rows says so."""
        return super()._replace(**{"along_rows": False, **others})
