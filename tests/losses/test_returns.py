"""step_returns: against a loop over the steps of each trajectory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from properties import examples
from test_gae import layouts

from steppo_kernels import StepLayout, step_gae, step_returns


def loops(rewards, layout, gamma, ends):
    """Return the discounted sums in plain Python; `rewards` are per step."""
    found = [0.0] * layout.num_steps
    members, offsets = layout.trajectory_steps.tolist(), layout.trajectory_offsets.tolist()
    for trajectory, end in enumerate(ends):
        following = end
        for step in reversed(members[offsets[trajectory] : offsets[trajectory + 1]]):
            following = rewards[step] + gamma * following
            found[step] = following
    return found


@examples(
    layout=layouts(),
    seed=st.integers(0, 2**31),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    truncated=st.booleans(),
)
def test_loops(target, layout, seed, gamma, truncated):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(layout.num_steps, dtype=torch.float64, generator=generator)
    ends = torch.zeros(layout.num_trajectories, dtype=torch.float64)
    if truncated:
        ends = torch.randn(layout.num_trajectories, dtype=torch.float64, generator=generator)
    found = step_returns(
        rewards.to(target.device),
        layout.to(target.device),
        gamma=gamma,
        bootstrap_values=ends.to(target.device) if truncated else None,
        backend=target.backend,
    )
    expected = loops(rewards.tolist(), layout, gamma, ends.tolist())
    torch.testing.assert_close(
        found.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13
    )


def test_they_are_the_returns_of_gae_without_values(target):
    """Rewards of tokens too, in the dtype of the computation."""
    layout = StepLayout.from_mask(
        torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 1]], device=target.device), backend="reference"
    )
    rewards = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).to(target.device)
    for dtype, computed in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        given = rewards.to(dtype).requires_grad_()
        found = step_returns(given, layout, gamma=0.9, backend=target.backend)
        zeros = torch.zeros(4, dtype=computed, device=target.device)
        expected = step_gae(
            given, zeros, layout, gamma=0.9, lam=1.0, whiten=False, backend=target.backend
        )
        assert found.dtype == computed
        assert not found.requires_grad
        assert torch.equal(found, expected.returns)


@pytest.mark.parametrize("gamma", [1.5, -0.1, float("nan")])
def test_gamma_is_a_fraction(gamma):
    layout = StepLayout.from_mask(torch.ones(1, 2), backend="reference")
    with pytest.raises(ValueError, match="gamma: got"):
        step_returns(torch.ones(1), layout, gamma=gamma, backend="reference")
