"""Step-level generalized advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..backends import operators
from ..backends.choice import Backend, resolve
from ..backends.untraced import traced
from ..layout.step_layout import StepLayout, require_layout
from ..outputs import StepAdvantages


@traced
def step_gae(
    rewards: Tensor,
    values: Tensor,
    layout: StepLayout,
    *,
    gamma: float = 0.99,
    lam: float = 1.0,
    bootstrap_values: Tensor | None = None,
    whiten: bool = True,
    backend: Backend = "auto",
) -> StepAdvantages:
    r"""Return GAE over the steps of each trajectory (StepPO, arXiv 2604.18401, section 3).

    .. math:: \delta_t = r_t + \gamma V_{t+1} - V_t, \quad
              \hat A_t = \sum_l (\gamma\lambda)^l \delta_{t+l}, \quad R_t = \hat A_t + V_t

    With ``layout.per_token()`` it is the token-level GAE over action tokens. Nothing here carries
    a gradient.

    Args:
        rewards: per step ``[S]``, or of the token shape: then they are summed into the step they
            fall in; a finite reward on a non-action token goes to the latest step before it in its
            row, else to the first one.
        values: per step ``[S]``, or of the token shape with position i the value of the state
            before token i.
        layout: the steps.
        gamma: discount factor per step, in [0, 1].
        lam: GAE factor per step, in [0, 1].
        bootstrap_values: ``[G]``, the value after the last step of each trajectory: 0 (the
            default) where it terminated, V where it was truncated.
        whiten: shift and scale the advantages to mean 0 and unbiased standard deviation 1 over all
            steps that belong to a trajectory. With fewer than 2 of them they are only shifted.
        backend: implementation.

    Returns:
        fp32 (fp64 if `values` is) ``[S]`` tensors; a step of no trajectory gets 0.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument.

    Example:
        >>> import torch
        >>> from steppo_kernels import StepLayout, step_gae
        >>> layout = StepLayout.from_mask(torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]))
        >>> rewards, values = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.5, 0.5, 0.25])
        >>> found = step_gae(rewards, values, layout, gamma=1.0, whiten=False)
        >>> found.advantages, found.returns
        (tensor([0.5000, 0.5000, 0.7500]), tensor([1., 1., 1.]))
    """
    steps = require_layout(layout)
    checks.switch("whiten", whiten)
    numbers = (checks.fraction("gamma", gamma), checks.fraction("lam", lam), float(whiten))
    values = checks.constant(checks.floating("values", values))
    device, dtype = steps.device, checks.compute_dtype(values)
    num_steps, shape = steps.num_steps, steps.shape
    chosen = resolve(backend, device)
    rewards, rewards_per_token = checks.steps_or_tokens(
        "rewards", rewards, num_steps, shape, device, dtype
    )
    values, values_per_token = checks.steps_or_tokens(
        "values", values, num_steps, shape, device, dtype
    )
    rewards = checks.constant(rewards)
    if rewards_per_token and steps.reward_index is not None:
        line = rewards.view(-1)
        counts = (steps.step_ids.view(-1) >= 0) | line.isfinite()
        rewards = operators.call(
            "sum_over_steps",
            chosen,
            torch.where(counts, line, 0.0),
            steps.reward_index,
            steps.reward_offsets,
        )
        rewards_per_token = False
    if values_per_token and values.numel() == 0:
        # Rows of length 0 may be steps, but have no position to hold a value.
        values, values_per_token = values.new_zeros(num_steps), False
    if bootstrap_values is not None:
        bootstrap_values = checks.constant(
            checks.vector(
                "bootstrap_values",
                bootstrap_values,
                steps.num_trajectories,
                "trajectory",
                device,
                dtype,
            )
        )
    advantages, returns = operators.runner("step_gae", chosen)(
        rewards,
        values,
        bootstrap_values,
        steps.timeline,
        numbers,
        rewards_per_token,
        values_per_token,
        steps.along_rows,
    )
    return StepAdvantages(advantages, returns)
