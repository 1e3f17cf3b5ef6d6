"""Random layouts, built by the package and by the oracle from the same input."""

from __future__ import annotations

import copy
import itertools
from typing import NamedTuple

import torch
from oracle import OracleLayout

from fuzz.draws import Draw
from steppo_kernels import StepLayout
from steppo_kernels.layout.step_layout import require_layout


class Pair(NamedTuple):
    """A layout of the package, the oracle's, and the mask that may stand for it in a loss."""

    layout: StepLayout
    oracle: OracleLayout
    mask: torch.Tensor | None


def draw_layout(draw: Draw, backend: str) -> Pair:
    """Build a layout and take it through a chain of views."""
    make = draw.named(
        "constructor", ["mask", "mask", "step_ids", "rows", "rows", "rows", "markers"]
    )
    pair = {"mask": _mask, "step_ids": _step_ids, "rows": _rows, "markers": _markers}[make](
        draw, backend
    )
    layout, oracle, mask = pair
    for _ in range(draw.rng.choice([0, 0, 1, 1, 2, 3])):
        way = draw.named("then", ["per_token", "per_trajectory", "per_trajectory", "keep", "to"])
        if way == "to":
            layout = layout.to(draw.device, non_blocking=draw.chance(0.5))
            continue
        mask = None
        if way == "keep":
            kept = draw.flags(oracle.size, draw.rng.choice([0.1, 0.5, 0.9, 1.0]))
            layout = layout.keep(_tensor(draw, kept, oracle.shape))
            oracle = oracle.keep(kept)
        else:
            layout, oracle = getattr(layout, way)(), getattr(oracle, way)()
    return Pair(layout, oracle, mask)


def check_layout(layout: StepLayout, oracle: OracleLayout) -> None:
    """Compare every field that the contract states."""
    assert tuple(layout.shape) == oracle.shape
    for name, want, dtype in (
        ("step_ids", oracle.step_ids, torch.int32),
        ("token_index", oracle.actions, torch.int64),
        ("step_offsets", oracle.step_offsets, torch.int64),
        ("step_lengths", [len(step) for step in oracle.steps], torch.int32),
        ("trajectory_steps", [s for own in oracle.trajectories for s in own], torch.int64),
        ("trajectory_offsets", oracle.trajectory_offsets, torch.int64),
        ("state_index", oracle.states, torch.int64),
        ("step_rows", oracle.step_rows, torch.int64),
    ):
        got = getattr(layout, name)
        assert got.dtype == dtype, name
        found = got.flatten().tolist()
        assert len(found) == len(want), (name, found, want)
        told = [one if two is None else two for one, two in zip(found, want, strict=True)]
        assert found == told, (name, found, want)
    assert layout.num_steps == len(oracle.steps)
    assert layout.num_tokens == len(oracle.actions)
    assert layout.num_trajectories == len(oracle.trajectories)
    # A promise to kernels, which nothing shown tells of; a copy is looked at entry by entry.
    promises = require_layout(layout).along_rows
    assert not promises or goes_along_rows(oracle)
    assert require_layout(copy.copy(layout)).along_rows >= promises


def goes_along_rows(oracle: OracleLayout) -> bool:
    """Return whether a row, read from its end, tells all of the steps of a trajectory, its own."""
    if len(oracle.trajectories) != len(oracle.rows):
        return False
    begin_of = {tokens[0]: step for step, tokens in enumerate(oracle.steps) if tokens}
    ids = oracle.step_ids
    for row, own in zip(oracle.rows, oracle.trajectories, strict=True):
        begun = [begin_of[at] for at in row if at in begin_of]
        if own != begun:
            return False
        if not begun:
            continue
        if begun != list(range(begun[0], begun[0] + len(begun))):
            return False
        if any(oracle.states[step] != oracle.steps[step][0] for step in own):
            return False
        latest = begun[0]
        for at in row:
            latest = begin_of.get(at, latest)
            if ids[at] != latest if ids[at] >= 0 else oracle.homes.get(at) != latest:
                return False
    return True


def _tensor(
    draw: Draw,
    values: list[bool] | list[int],
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bool,
) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).reshape(shape).to(draw.device)


def _shape(draw: Draw) -> tuple[tuple[int, ...], list[int] | None]:
    """Return a token shape, and where its rows begin if it is packed."""
    rows = draw.rng.choice([1, 2, 3, 4, draw.size])
    width = draw.rng.choice([1, 3, 5, draw.size])
    if draw.chance(0.04):
        rows, width = draw.rng.choice([(0, 3), (2, 0), (0, 0)])
    form = draw.named("form", ["rows", "rows", "packed", "packed row", "one row"])
    if form == "rows":
        return (rows, width), None
    if form == "one row":
        return (width,), None
    count = rows * width
    cuts = sorted(draw.rng.randint(0, count) for _ in range(draw.rng.randint(0, rows)))
    return ((count,) if form == "packed" else (1, count)), [0, *cuts, count]


def _runs(draw: Draw, count: int) -> list[bool]:
    """Return a mask whose runs are short or long; of all ones or all zeros now and then."""
    if draw.chance(0.1):
        return [draw.chance(0.5)] * count
    turn = draw.rng.choice([0.2, 0.5, 0.9])
    values, value = [], draw.chance(0.5)
    for _ in range(count):
        values.append(value)
        value ^= draw.chance(turn)
    return values


def _options(draw: Draw, cuts: list[int] | None) -> dict[str, torch.Tensor]:
    if cuts is None:
        return {}
    kind = draw.rng.choice([torch.int32, torch.int64])
    return {"cu_seqlens": _tensor(draw, cuts, (len(cuts),), kind)}


def _mask(draw: Draw, backend: str) -> Pair:
    shape, cuts = _shape(draw)
    size = int(torch.Size(shape).numel())
    values = _runs(draw, size)
    boundaries = draw.flags(size, 0.4) if draw.chance(0.3) else None
    kind = draw.rng.choice([torch.bool, torch.bool, torch.int64, torch.uint8, torch.float32])
    mask = draw.strided(_tensor(draw, values, shape, kind))
    options = _options(draw, cuts)
    if boundaries is not None:
        draw.words.append("boundaries")
        options["boundaries"] = _tensor(draw, boundaries, shape)
    layout = StepLayout.from_mask(mask, **options, backend=backend)
    oracle = OracleLayout.from_mask(values, shape, cu_seqlens=cuts, boundaries=boundaries)
    return Pair(layout, oracle, None if options else mask)


def _step_ids(draw: Draw, backend: str) -> Pair:
    shape, cuts = _shape(draw)
    size = int(torch.Size(shape).numel())
    values, opens = _runs(draw, size), draw.flags(size, 0.3)
    width = shape[-1] if cuts is None else size
    starts = set(cuts or range(0, size + 1, max(width, 1)))
    ids, current = [], 0
    for at in range(size):
        if at in starts:
            current = draw.rng.randint(0, 4)
        elif opens[at]:
            current += draw.rng.randint(1, 3)
        ids.append(current if values[at] else -1)
    kind = draw.rng.choice([torch.int32, torch.int64])
    tensor = draw.strided(_tensor(draw, ids, shape, kind))
    layout = StepLayout.from_step_ids(tensor, **_options(draw, cuts), backend=backend)
    return Pair(layout, OracleLayout.from_step_ids(ids, shape, cu_seqlens=cuts), None)


def _rows(draw: Draw, backend: str) -> Pair:
    """Steps of a few trajectories, in shuffled rows."""
    rows, width = draw.rng.randint(0, draw.size + 2), draw.rng.choice([1, 1, 2, 4, draw.size])
    full, ones = draw.rng.choice([(0.2, 0.5), (0.8, 0.8), (1.0, 1.0)])
    values = []
    for _ in range(rows):
        values += [draw.chance(ones)] * width if draw.chance(full) else _runs(draw, width)
    valid = draw.flags(rows, 0.8) if draw.chance(0.3) else None
    names, indices = _order(draw, rows)
    form = draw.named("trajectory ids", ["strings", "integers", "tensor"])
    given: object = [f"t{name}" for name in names] if form == "strings" else list(names)
    if form == "tensor":
        given = _tensor(draw, names, (rows,), torch.int64)
    order: object = indices
    if draw.chance(0.5):
        order = _tensor(draw, indices, (rows,), torch.int64)
    mask = draw.strided(_tensor(draw, values, (rows, width)))
    options = {} if valid is None else {"valid": _tensor(draw, valid, (rows,))}
    layout = StepLayout.from_rows(mask, given, order, **options, backend=backend)
    return Pair(
        layout, OracleLayout.from_rows(values, (rows, width), names, indices, valid=valid), None
    )


def _order(draw: Draw, rows: int) -> tuple[list[int], list[int]]:
    """Return trajectory and place in time of each row: at random, or in order but for a few."""
    names = [draw.rng.randint(0, draw.rng.choice([1, 1, rows])) for _ in range(rows)]
    indices = draw.rng.sample(range(-rows, 2 * rows), rows)
    if rows and draw.chance(0.5):
        names.sort()
        indices.sort()
        for _ in range(draw.rng.randint(0, 2)):
            one, two = draw.rng.randrange(rows), draw.rng.randrange(rows)
            for order in (names, indices):
                order[one], order[two] = order[two], order[one]
    return names, indices


# Token ids: 1 2 opens a turn of the model and 1 2 3 4 one with an empty think block, 1 5 opens
# one of the user, 6 and 7 end a turn, 0 is padding, the others are text.
_PIECES = ([1, 2], [1, 2, 3, 4], [1, 5], [6], [7], [8], [9, 8], [3], [2], [1])


def _markers(draw: Draw, backend: str) -> Pair:
    shape, cuts = _shape(draw)
    size = int(torch.Size(shape).numel())
    ids: list[int] = []
    while len(ids) < size:
        ids += draw.rng.choice(_PIECES)
    ids = ids[:size]
    starts = draw.named("starts", [[[1, 2]], [[1, 2]], [[1, 2], [1, 2, 3, 4]], [[1]]])
    ends = draw.named("ends", [[6], [6], [6, 7]])
    stops: list[list[int]] = draw.named("stops", [[], [], [[1]], [[1, 5]]])
    valid = _valid(draw, shape, cuts) if draw.chance(0.4) else None
    options: dict[str, object] = dict(_options(draw, cuts))
    if stops:
        options["stop"] = stops[0]
    if valid is not None:
        draw.words.append("valid")
        options["valid"] = _tensor(draw, valid, shape)
        ids = [
            one if real else draw.rng.choice([0, 6]) for one, real in zip(ids, valid, strict=True)
        ]
    start: object = starts if len(starts) > 1 else starts[0]
    end: object = ends if len(ends) > 1 else ends[0]
    tensor = draw.strided(_tensor(draw, ids, shape, torch.int64))
    layout = StepLayout.from_markers(tensor, start, end, **options, backend=backend)
    oracle = OracleLayout.from_markers(
        ids, shape, starts, ends, stops=stops, valid=valid, cu_seqlens=cuts
    )
    return Pair(layout, oracle, None)


def _valid(draw: Draw, shape: tuple[int, ...], cuts: list[int] | None) -> list[bool]:
    """Return an attention mask: padding at either side of a row."""
    size = int(torch.Size(shape).numel())
    bounds = cuts or list(range(0, size + 1, max(shape[-1], 1)))
    valid = [False] * size
    for begin, end in itertools.pairwise(bounds):
        first, last = sorted(draw.rng.randint(begin, end) for _ in range(2))
        if draw.chance(0.5):
            first = begin
        valid[first:last] = [True] * (last - first)
    return valid
