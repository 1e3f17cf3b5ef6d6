"""verl's aggregation modes as a reduction and its normalizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ...config import Reduction, one_of

MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)


class Aggregation(NamedTuple):
    """A reduction of `StepPOConfig`, and what it divides by; None is its own denominator."""

    reduction: Reduction
    normalizer: float | Tensor | None


def aggregation_of(
    mode: str, batch: Mapping[str, Any], mask: Tensor, rows_are_steps: bool
) -> Aggregation:
    """Return how verl aggregates: its sequences are rows.

    The numbers of the mini-batch on all ranks make the result that of the mini-batch: gradients of
    micro-batches add up, and verl averages those of ranks. Without these numbers, it is the mean
    over the rows or tokens of the call.

    Args:
        mode: verl's `loss_agg_mode`.
        batch: verl's `global_batch_info`: `dp_size`, `batch_num_tokens`, `global_batch_size` and
            `loss_scale_factor`, each of which may be missing or None.
        mask: bool ``[B, R]``, the action tokens of the call.
        rows_are_steps: whether each row is one step.

    Raises:
        ValueError: the mode is unknown, or a number is missing where there are several ranks.
    """
    one_of("loss_agg_mode", mode, MODES)
    ranks = int(batch.get("dp_size") or 1)
    if mode == "token-sum":
        return Aggregation("token_mean", 1 / ranks)
    if mode == "token-mean":
        return Aggregation("token_mean", _of_rank(batch, "batch_num_tokens", ranks))
    rows = _of_rank(batch, "global_batch_size", ranks)
    if mode == "seq-mean-token-mean":
        return Aggregation("step_mean" if rows_are_steps else "trajectory_mean", rows)
    total: float | Tensor = mask.any(1).sum() if rows is None else rows
    if mode == "seq-mean-token-sum-norm":
        scale = batch.get("loss_scale_factor")
        total = total * (mask.shape[1] if scale is None else scale)
    return Aggregation("token_mean", total)


def _of_rank(batch: Mapping[str, Any], name: str, ranks: int) -> float | None:
    """Return a number of the mini-batch by rank, as gradients are averaged over ranks later."""
    count = batch.get(name)
    if count is None:
        if ranks > 1:
            raise ValueError(
                f"global_batch_info: got no {name!r} with {ranks} ranks, expected the number of "
                "the mini-batch on all of them"
            )
        return None
    return float(count) / ranks
