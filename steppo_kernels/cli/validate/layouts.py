"""Cases of `StepLayout`: every tensor of a layout must be the reference's, bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...backends.choice import Backend
from ...layout.step_layout import StepLayout
from .case import Case, Inputs, Outputs, Problem
from .draw import Draw

Build = Callable[[Backend], StepLayout]


def random_layout(draw: Draw) -> StepLayout:
    """Return a layout of any kind, made by the reference."""
    _, _, arguments = draw.choice(_CONSTRUCTORS)
    return arguments(draw)("reference")


def packed_rows(draw: Draw, rows: int, length: int) -> Tensor:
    """Return the offsets of `rows` rows, some empty, that `rows` * `length` tokens fall into."""
    total = rows * length
    cuts = draw.integers(0, total, rows - 1).sort().values
    ends = cuts.new_tensor([0]), cuts, cuts.new_tensor([total])
    return torch.cat(ends).to(draw.choice((torch.int32, torch.int64)))


def _from_mask(draw: Draw) -> Build:
    mask = draw.mask()
    mask = mask.to(draw.choice((torch.bool, torch.int64, torch.int32, torch.float32)))
    if draw.flags(0.2):
        mask = mask.reshape(-1)
    return lambda backend: StepLayout.from_mask(mask, backend=backend)


def _from_packed_mask(draw: Draw) -> Build:
    mask = draw.mask()
    rows = packed_rows(draw, *mask.shape)
    return lambda backend: StepLayout.from_mask(mask.reshape(-1), cu_seqlens=rows, backend=backend)


def _from_boundaries(draw: Draw) -> Build:
    mask = draw.mask()
    # Some of them fall outside of actions, where they open nothing.
    boundaries = draw.flags(0.3, *mask.shape)
    return lambda backend: StepLayout.from_mask(mask, boundaries=boundaries, backend=backend)


def _step_ids(draw: Draw) -> Tensor:
    """Return ids with gaps between them, and steps with holes in them."""
    action = draw.mask()
    rows, length = action.shape
    grows = draw.flags(0.2, rows, length) * draw.integers(1, 1000, rows, length)
    ids = draw.integers(0, 3, rows, 1) + grows.cumsum(1)
    return torch.where(action, ids, -1)


def _from_step_ids(draw: Draw) -> Build:
    ids = _step_ids(draw).to(draw.choice((torch.int32, torch.int64)))
    return lambda backend: StepLayout.from_step_ids(ids, backend=backend)


def _from_packed_step_ids(draw: Draw) -> Build:
    ids = _step_ids(draw)
    # Any cut of a row leaves its ids in order, but a join of two would not.
    rows, length = ids.shape
    inside = draw.integers(0, length, rows).sort().values if length else ids.new_zeros(rows)
    starts = torch.arange(rows, device=ids.device) * length
    cuts = torch.cat((starts, starts + inside, ids.new_tensor([ids.numel()]))).sort().values
    return lambda backend: StepLayout.from_step_ids(
        ids.reshape(-1), cu_seqlens=cuts, backend=backend
    )


def _from_rows(draw: Draw) -> Build:
    mask = draw.mask()
    rows = mask.shape[0]
    trajectories = draw.integers(0, max(rows // 3, 1), rows).tolist()
    names = [f"episode {number}" for number in trajectories]
    ids = draw.choice((names, trajectories))
    order = draw.permutation(rows) * 2 - 1
    valid = draw.choice((None, draw.flags(0.8, rows)))
    return lambda backend: StepLayout.from_rows(mask, ids, order, valid=valid, backend=backend)


def _from_markers(draw: Draw) -> Build:
    rows, length = draw.mask().shape
    # With few different tokens, matches come often and overlap.
    tokens = draw.integers(0, 3, rows, length)
    sequences = [draw.integers(0, 3, draw.integer(1, 3)) for _ in range(draw.integer(1, 3))]
    several = draw.flags(0.5)
    start = sequences if several else sequences[0]
    end = draw.integers(0, 3, 2) if several else draw.integer(0, 3)
    stop = draw.choice((None, draw.integers(0, 3, draw.integer(1, 3))))
    valid = draw.choice((None, draw.flags(0.8, rows, length)))
    if draw.flags(0.5):
        cuts = packed_rows(draw, rows, length)
        tokens = tokens.reshape(-1)
        valid = None if valid is None else valid.reshape(-1)
    else:
        cuts = None
    return lambda backend: StepLayout.from_markers(
        tokens, start, end, stop=stop, valid=valid, cu_seqlens=cuts, backend=backend
    )


def _keep(draw: Draw) -> Build:
    build = draw.choice((_from_mask, _from_step_ids, _from_rows))(draw)
    mask = draw.flags(0.7, *build("reference").shape)
    return lambda backend: build(backend).keep(mask)


def _per_token(draw: Draw) -> Build:
    build = draw.choice((_from_mask, _from_step_ids, _from_rows))(draw)
    return lambda backend: build(backend).per_token()


def _per_trajectory(draw: Draw) -> Build:
    build = draw.choice((_from_mask, _from_step_ids, _from_rows))(draw)
    return lambda backend: build(backend).per_trajectory()


_CONSTRUCTORS: tuple[tuple[str, str, Callable[[Draw], Build]], ...] = (
    ("StepLayout.from_mask", "rows", _from_mask),
    ("StepLayout.from_mask", "packed", _from_packed_mask),
    ("StepLayout.from_mask", "boundaries", _from_boundaries),
    ("StepLayout.from_step_ids", "rows", _from_step_ids),
    ("StepLayout.from_step_ids", "packed", _from_packed_step_ids),
    ("StepLayout.from_rows", "rows", _from_rows),
    ("StepLayout.from_markers", "rows or packed", _from_markers),
    ("StepLayout.per_token", "", _per_token),
    ("StepLayout.per_trajectory", "", _per_trajectory),
    ("StepLayout.keep", "", _keep),
)


def _case(operation: str, variant: str, arguments: Callable[[Draw], Build]) -> Case:
    def draw_problem(draw: Draw) -> Problem:
        build = arguments(draw)

        def run(inputs: Inputs, backend: Backend) -> Outputs:
            return build(backend).tensors()

        return Problem(run)

    return Case(operation, variant, draw_problem, exact=True)


CASES: tuple[Case, ...] = tuple(_case(*constructor) for constructor in _CONSTRUCTORS)
