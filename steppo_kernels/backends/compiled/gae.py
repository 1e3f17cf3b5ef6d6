"""Step-level GAE in compiled code."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..records import Timeline, record
from .launch import DTYPES, Native, addresses, empty


def step_gae(
    native: Native,
    rewards: Tensor,
    values: Tensor,
    bootstrap_values: Tensor | None,
    timeline: Sequence[Tensor],
    config: tuple[float, ...],
    rewards_per_token: bool,
    values_per_token: bool,
    along_rows: bool,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns ``[S]``: the operator `step_gae`."""
    held = record(Timeline, timeline)
    num_steps = held.state_index.numel()
    advantages, returns = (
        empty(rewards, num_steps, values.dtype),
        empty(rewards, num_steps, values.dtype),
    )
    gamma, lam, whiten = config
    tensors = (
        DTYPES[values.dtype],
        *addresses(rewards, values, bootstrap_values),
        rewards_per_token,
        values_per_token,
        along_rows,
        *addresses(advantages, returns),
    )
    native.kernels.step_gae(tensors, held.fields, (gamma, lam, bool(whiten)), native.place(rewards))
    return advantages, returns
