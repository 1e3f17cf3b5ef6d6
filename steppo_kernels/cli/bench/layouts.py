"""Cases of the constructors of `StepLayout`.

What makes one layout of another (`per_token`, `per_trajectory`, `keep`) is plain PyTorch whatever
the backend: there is nothing to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...backends.choice import Backend
from ...layout.step_layout import StepLayout
from .batch import ON_TOKENS, Draw, token_batch
from .case import Case, Inputs, Problem, Size, nbytes

Build = Callable[[Backend], StepLayout]

# Rows of one step each, as most agent trainers have them.
_ONE_STEP_ROWS = {
    "cpu": (Size(256, 64), Size(2048, 512)),
    "cuda": (Size(2048, 512), Size(8192, 512)),
}
_ROWS_OF_A_TRAJECTORY = 16
# Sequences that open and close an action, and the ids of all other tokens.
_START, _END, _OTHERS = (0, 1, 2), 3, range(4, 32768)


def _from_mask(size: Size, device: torch.device) -> tuple[Build, int]:
    mask = token_batch(size, device).mask
    return lambda backend: StepLayout.from_mask(mask, backend=backend), nbytes(mask)


def _from_step_ids(size: Size, device: torch.device) -> tuple[Build, int]:
    ids = token_batch(size, device).layout.step_ids
    return lambda backend: StepLayout.from_step_ids(ids, backend=backend), nbytes(ids)


def _from_rows(size: Size, device: torch.device) -> tuple[Build, int]:
    lengths = 1 + Draw(1, device).integers(size.length, size.rows, 1)
    mask = torch.arange(size.length, device=device) < lengths
    rows = torch.arange(size.rows, device=device)
    ids, order = rows // _ROWS_OF_A_TRAJECTORY, rows % _ROWS_OF_A_TRAJECTORY

    def build(backend: Backend) -> StepLayout:
        return StepLayout.from_rows(mask, ids, order, backend=backend)

    return build, nbytes(mask, ids, order)


def _from_markers(size: Size, device: torch.device) -> tuple[Build, int]:
    mask = token_batch(size, device).mask
    ids = _OTHERS.start + Draw(1, device).integers(len(_OTHERS), *mask.shape)
    # A run of the mask begins with what opens an action, if it is long enough, and ends with what
    # closes it.
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    first = mask & ~torch.nn.functional.pad(mask[:, :-1], (1, 0))
    for place, token in enumerate(_START):
        ids[torch.nn.functional.pad(first[:, : size.length - place], (place, 0))] = token
    ids[last] = _END

    def build(backend: Backend) -> StepLayout:
        return StepLayout.from_markers(ids, _START, _END, backend=backend)

    return build, nbytes(ids)


def _case(
    arguments: Callable[[Size, torch.device], tuple[Build, int]],
    sizes: Mapping[str, tuple[Size, ...]],
) -> Case:
    def draw_problem(size: Size, device: torch.device) -> Problem:
        build, read = arguments(size, device)

        def call(_: Inputs, backend: Backend) -> StepLayout:
            return build(backend)

        return Problem(
            call,
            {},
            _tensors,
            moved=read + nbytes(*build("reference").tensors().values()),
            why_not_compiled="the sizes of a layout depend on the steps that are found",
        )

    operation = f"StepLayout.{arguments.__name__.removeprefix('_')}"
    return Case(operation, "", sizes, draw_problem)


def _tensors(layout: StepLayout) -> dict[str, Tensor]:
    return layout.tensors()


CASES: tuple[Case, ...] = (
    _case(_from_mask, ON_TOKENS),
    _case(_from_step_ids, ON_TOKENS),
    _case(_from_rows, _ONE_STEP_ROWS),
    _case(_from_markers, ON_TOKENS),
)
