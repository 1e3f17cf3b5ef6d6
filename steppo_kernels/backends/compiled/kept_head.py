"""Products of hidden states with the rows of the weight that are kept, in compiled code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..records import IdIndex, Sets, record
from .kept_log_probs import kept_rows
from .launch import DTYPES, Native, addresses, empty, start

# The record ``IdIndex`` where there is none.
_NO_INDEX = (0,) * 12
# Pairs of a set that a block adds up: enough that what parts leave is small next to the rows of the
# weight, and few enough that a long set is split over many processors.
_PART = 512


def kept_logits(
    native: Native,
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    sets: Sequence[Tensor],
    by_id: Sequence[Tensor],
) -> None:
    """Run the operator `kept_logits` of `steppo_kernels.backends.kept_operators`."""
    held, index = record(Sets, sets), record(IdIndex, by_id).fields if by_id else _NO_INDEX
    product = _product(logits, hidden, weight, bias, rows)
    native.kernels.kept_logits(product, held.fields, index, native.place(logits))


def kept_directions(
    native: Native,
    logits: Tensor,
    directions: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    places: Tensor,
    rows: Tensor,
    sets: Sequence[Tensor],
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
) -> None:
    """Run the operator `kept_directions` of `steppo_kernels.backends.kept_operators`."""
    held, part = record(Sets, sets), _PART
    slots = held.ids.numel() // part + 1
    sums = empty(logits, (slots, hidden.shape[1]), logits.dtype)
    tops = empty(logits, rows.numel() + slots, torch.float64)
    totals = torch.empty_like(tops)
    native.kernels.kept_directions(
        _product(logits, hidden, weight, bias, rows),
        kept_rows(logits, places, rows, temperatures, temperature, softcap),
        held.fields,
        (*addresses(directions), part, *addresses(sums, tops, totals)),
        native.place(logits),
    )


def _product(
    logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor
) -> tuple[int, ...]:
    """Return products of rows as the record ``KeptProduct``."""
    weight_stride, num_rows, size = weight.stride(0), rows.numel(), hidden.shape[1]
    return (
        DTYPES[hidden.dtype],
        *addresses(hidden),
        start(weight),
        weight_stride,
        *addresses(bias, rows),
        num_rows,
        size,
        *addresses(logits),
    )
