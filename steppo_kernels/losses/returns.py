"""Discounted returns of steps."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..backends.choice import Backend
from ..backends.untraced import traced
from ..layout.step_layout import StepLayout, require_layout
from .gae import step_gae


@traced
def step_returns(
    rewards: Tensor,
    layout: StepLayout,
    *,
    gamma: float,
    bootstrap_values: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Return the discounted sum of the rewards from each step on, of methods without a critic.

    .. math:: R_t = \sum_{l \ge 0} \gamma^l r_{t+l}

    It runs over the steps of a trajectory: the step rewards of GiGPO (arXiv 2505.10978), and the
    return of REINFORCE with a step as the action. `step_gae` has the same returns where every value
    is 0 and lam is 1. `group_normalize` makes advantages of them.

    Args:
        rewards: per step ``[S]``, or of the token shape: then they are summed into the step they
            fall in, as in `step_gae`. No gradient.
        layout: the steps.
        gamma: discount factor per step, in [0, 1].
        bootstrap_values: ``[G]``, what follows the last step of each trajectory: 0 (the default)
            where it terminated, an estimate of the rest where it was truncated.
        backend: implementation.

    Returns:
        fp32 (fp64 if `rewards` is) ``[S]``; a step of no trajectory gets 0.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument.

    Example:
        >>> import torch
        >>> from steppo_kernels import StepLayout, step_returns
        >>> layout = StepLayout.from_mask(torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]))
        >>> rewards = torch.zeros(2, 4)
        >>> rewards[:, -1] = torch.tensor([1.0, 3.0])
        >>> step_returns(rewards, layout, gamma=0.5)
        tensor([0.5000, 1.0000, 3.0000])
    """
    steps = require_layout(layout)
    dtype = checks.compute_dtype(checks.floating("rewards", rewards))
    values = torch.zeros(steps.num_steps, dtype=dtype, device=steps.device)
    return step_gae(
        rewards,
        values,
        layout,
        gamma=gamma,
        lam=1.0,
        bootstrap_values=bootstrap_values,
        whiten=False,
        backend=backend,
    ).returns
