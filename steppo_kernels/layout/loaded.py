"""What a layout must be, checked entry by entry: for those that come from a file or a pipe."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import checks, csr
from ..backends.reference.segment import step_starts
from .step_tensors import DERIVED, StepTensors

_DTYPES = {
    "step_ids": torch.int32,
    "step_lengths": torch.int32,
    "trajectory_counts": torch.int32,
}
_OPTIONAL = ("reward_index", "reward_offsets")


def checked_tensors(state: Mapping[str, object]) -> StepTensors:
    """Return copies of the tensors of a layout that was saved.

    Raises:
        ValueError, TypeError: they are not those of a layout.
    """
    given = dict(state) if isinstance(state, Mapping) else {}
    known = set(StepTensors._fields) - set(DERIVED)
    wanted = known - set(_OPTIONAL)
    if not wanted <= set(given) <= known:
        raise ValueError(f"StepLayout: got a state of {sorted(given)}, expected {sorted(wanted)}")
    made = {}
    for name, value in given.items():
        dtype = _DTYPES.get(name, torch.int64)
        tensor = checks.dense(f"StepLayout.{name}", value)
        if tensor.dtype != dtype:
            raise TypeError(f"StepLayout.{name}: got {tensor.dtype}, expected {dtype}")
        checks.dims(f"StepLayout.{name}", tensor, (1, 2) if name == "step_ids" else (1,))
        made[name] = tensor.clone(memory_format=torch.contiguous_format)
    device = made["step_ids"].device
    for name, tensor in made.items():
        checks.on_device(f"StepLayout.{name}", tensor, device)
    along_rows = False
    if device.type != "meta":
        # What follows from tensors is made when they are known to be sound.
        on_cpu = {name: tensor.cpu() for name, tensor in made.items()}
        unchecked = StepTensors(**on_cpu, step_starts=on_cpu["step_offsets"], along_rows=False)
        _check_values(unchecked)
        along_rows = _goes_along_rows(unchecked)
    starts = step_starts(made["token_index"], made["step_offsets"])
    return StepTensors(**made, step_starts=starts, along_rows=along_rows)


def _check_values(steps: StepTensors) -> None:
    """Raise unless the tensors (on the CPU) agree with each other."""
    num_positions, num_tokens, num_steps = (
        steps.step_ids.numel(),
        steps.num_tokens,
        steps.num_steps,
    )
    num_rows = len(steps.row_offsets) - 1
    _offsets("row_offsets", steps.row_offsets, None, num_positions)
    _offsets("step_offsets", steps.step_offsets, num_steps, num_tokens)
    _offsets("trajectory_offsets", steps.trajectory_offsets, None, len(steps.trajectory_steps))
    _require("step_lengths", torch.equal(steps.step_lengths, steps.step_offsets.diff().int()))
    _distinct("token_index", steps.token_index, num_positions)
    _distinct("trajectory_steps", steps.trajectory_steps, num_steps)
    numbers = torch.arange(num_steps, dtype=torch.int32, device="cpu")
    ids = torch.full((num_positions,), -1, dtype=torch.int32, device="cpu")
    ids[steps.token_index] = torch.repeat_interleave(numbers, steps.step_offsets.diff())
    _require("step_ids", torch.equal(ids, steps.step_ids.reshape(-1)))
    places = (ids >= 0).nonzero().squeeze(1)
    stays = csr.group_of(places, steps.row_offsets).diff() == 0
    _require("step_ids", not bool((stays & (ids[places].diff() < 0)).any()))
    rows = csr.group_of(steps.token_index, steps.row_offsets)
    goes_on = (rows.diff() == 0) & (ids[steps.token_index].diff() == 0)
    _require("token_index", not bool((goes_on & (steps.token_index.diff() < 0)).any()))
    counts = csr.count_nonempty(
        steps.step_lengths, steps.trajectory_steps, steps.trajectory_offsets, num_steps
    )
    _require("trajectory_counts", torch.equal(steps.trajectory_counts, counts))
    _within("state_index", steps.state_index, num_steps, max(num_positions, 1))
    _within("step_rows", steps.step_rows, num_steps, max(num_rows, 1))
    if (steps.reward_index is None) != (steps.reward_offsets is None):
        raise ValueError("StepLayout.reward_index: got it alone, expected reward_offsets with it")
    if steps.reward_index is not None and steps.reward_offsets is not None:
        _distinct("reward_index", steps.reward_index, num_positions)
        _offsets("reward_offsets", steps.reward_offsets, num_steps, len(steps.reward_index))


def _goes_along_rows(steps: StepTensors) -> bool:
    """Return `StepTensors.along_rows` of sound tensors (on the CPU), by a look at each of them."""
    members, rows = steps.trajectory_steps, steps.row_offsets
    if steps.reward_index is not None or steps.num_trajectories != len(rows) - 1:
        return False
    lengths = steps.step_lengths.to(torch.int64)
    if bool((lengths[members] == 0).any()) or int(lengths[members].sum()) != steps.num_tokens:
        return False
    row_of_member = csr.group_of(torch.arange(len(members), device="cpu"), steps.trajectory_offsets)
    row_of_step = torch.full_like(lengths, -1)
    row_of_step[members] = row_of_member
    row_of_token = csr.group_of(steps.token_index, rows)
    first = steps.token_index[steps.step_offsets[members]]
    return (
        torch.equal(row_of_token, torch.repeat_interleave(row_of_step, lengths))
        and torch.equal(steps.state_index[members], first)
        and bool(((members.diff() == 1) | (row_of_member.diff() > 0)).all())
    )


def _require(name: str, holds: bool) -> None:
    if not holds:
        raise ValueError(
            f"StepLayout.{name}: got entries that do not go with the other tensors, expected those "
            "of a layout"
        )


def _offsets(name: str, offsets: Tensor, num_groups: int | None, num_members: int) -> None:
    _require(name, len(offsets) > 0 and (num_groups is None or len(offsets) == num_groups + 1))
    _require(name, int(offsets[0]) == 0 and int(offsets[-1]) == num_members)
    # Differences of such numbers may overflow.
    _require(name, not bool((offsets[1:] < offsets[:-1]).any()))


def _within(name: str, values: Tensor, length: int, limit: int) -> None:
    _require(name, len(values) == length)
    _require(name, not bool(((values < 0) | (values >= limit)).any()))


def _distinct(name: str, values: Tensor, limit: int) -> None:
    _within(name, values, len(values), limit)
    _require(name, len(values.unique()) == len(values))
