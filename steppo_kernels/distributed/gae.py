"""Step-level GAE whose advantages are whitened over the steps of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends.choice import Backend
from ..backends.untraced import untraced
from ..layout.step_layout import StepLayout, require_layout
from ..losses.gae import step_gae as gae_of_this_rank
from ..outputs import StepAdvantages
from ..ranks import Call, Ranks
from .words import bits_of, numbers_of

# What is added to a standard deviation before it divides, and one that leaves nothing to divide by.
_EPS = 1e-8
_UNDIVIDED = 1 - _EPS


@untraced
def step_gae(
    rewards: Tensor,
    values: Tensor,
    layout: StepLayout,
    *,
    gamma: float = 0.99,
    lam: float = 1.0,
    bootstrap_values: Tensor | None = None,
    whiten: bool = True,
    group: Any = None,
    backend: Backend = "auto",
) -> StepAdvantages:
    """Return `steppo_kernels.step_gae` of the trajectories of this rank, whitened over all ranks.

    Trajectories are whole on their rank. All ranks call it, also one without a row, for which a
    layout of shape ``[0, T]`` or of masked tokens alone does. It speaks to the other ranks once, in
    a gather of 168 bytes a rank (with ``whiten=False`` too, as ranks are to agree on that), for
    which the host waits.

    Args:
        rewards: as in `steppo_kernels.step_gae`.
        values: as there.
        layout: the steps of this rank.
        gamma: as there; the same on all ranks.
        lam: as there; the same on all ranks.
        bootstrap_values: as there.
        whiten: shift and scale the advantages to mean 0 and unbiased standard deviation 1 over all
            steps of all ranks that belong to a trajectory. With fewer than 2 of them they are only
            shifted.
        group: a ProcessGroup or a DeviceMesh of one dimension; None is all ranks. Ranks that hold
            the same trajectories (of tensor or context parallelism) are not to be in it together.
        backend: implementation.

    Returns:
        As `steppo_kernels.step_gae`. Counts, means and sums of squared deviations of the ranks are
        combined in fp64 and in their order, without cancellation.

    Raises:
        ValueError, TypeError: naming the argument; or ranks got different arguments.
        RuntimeError: another rank raised an error, or there is no process group.

    Example:
        >>> import torch.distributed as dist
        >>> from steppo_kernels import distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> layout = StepLayout.from_mask(torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]))
        >>> rewards, values = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.5, 0.5, 0.25])
        >>> distributed.step_gae(rewards, values, layout, gamma=1.0).advantages
        tensor([-0.5774, -0.5774,  1.1547])
        >>> dist.destroy_process_group()
    """
    ranks = Ranks.of("group", group)
    with Call("step_gae", "group", ranks) as call:
        checks.switch("whiten", whiten)
        found = gae_of_this_rank(
            rewards,
            values,
            layout,
            gamma=gamma,
            lam=lam,
            bootstrap_values=bootstrap_values,
            whiten=False,
            backend=backend,
        )
        members = require_layout(layout).trajectory_steps
        raw = found.advantages.to(torch.float64)
        count, mean, squares = len(members), 0.0, 0.0
        if whiten and count:
            # Relative to one of them, the mean of equal numbers is that number.
            shift = raw[members[0]]
            shifted = raw[members] - shift
            middle = shifted.mean()
            mean, squares = torch.stack(
                (shift + middle, (shifted - middle).square().sum())
            ).tolist()
        facts = {
            "gamma": float(gamma),
            "lam": float(lam),
            "whiten": whiten,
            "dtype": found.advantages.dtype,
        }
        said = call.agree(facts, (count, *bits_of((mean, squares))))
    if not whiten:
        return found
    mean, deviation = _combined([(one, numbers_of(bits)) for one, *bits in said])
    whitened = torch.zeros_like(found.advantages)
    whitened[members] = ((raw[members] - mean) / (deviation + _EPS)).to(whitened.dtype)
    return StepAdvantages(whitened, found.returns)


def _combined(lots: list[tuple[int, tuple[float, ...]]]) -> tuple[float, float]:
    """Return the mean and the unbiased standard deviation of several lots of numbers.

    Each has a count, and a mean with a sum of squared deviations from it. Of fewer than two
    numbers the deviation is one that divides nothing.
    """
    parts = [(count, *moments) for count, moments in lots if count]
    total = sum(count for count, *_ in parts)
    if total == 0:
        return 0.0, _UNDIVIDED
    # Relative to the first mean, so that equal means give that mean.
    first = parts[0][1]
    mean = first + sum(count * (own - first) for count, own, _ in parts) / total
    if total == 1:
        return mean, _UNDIVIDED
    squares = sum(own_squares + count * (own - mean) ** 2 for count, own, own_squares in parts)
    return mean, (squares / (total - 1)) ** 0.5
