"""step_gae: against Python loops, against fp64, and where whitening has nothing to divide by."""

from __future__ import annotations

import oracles
import pytest
import torch
from batches import Error, fp64, ragged_mask, random_batch
from hypothesis import strategies as st
from properties import examples

from steppo_kernels import StepLayout, step_gae

_EPS = torch.finfo(torch.float32).eps


def whitened(raw, members):
    """Shift and scale the entries `members` of a list."""
    chosen = torch.tensor(raw, dtype=torch.float64)[members]
    centered = chosen - chosen.mean()
    if len(members) >= 2 and float(chosen.std()) > 0:
        centered = centered / (chosen.std() + 1e-8)
    found = torch.zeros(len(raw), dtype=torch.float64)
    found[members] = centered
    return found


@st.composite
def layouts(draw):
    """Layouts from masks and from rows, shuffled, with empty steps and padding."""
    length = draw(st.integers(1, 6))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    rows = draw(st.lists(row, min_size=1, max_size=6))
    mask = torch.tensor(rows)
    if draw(st.booleans()):
        return StepLayout.from_mask(mask, backend="reference")
    order = list(draw(st.permutations(range(len(rows)))))
    groups = draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    valid = draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    return StepLayout.from_rows(mask, groups, order, valid=torch.tensor(valid), backend="reference")


def test_the_oracle_keeps_the_rewards_of_a_row_without_actions():
    mask = torch.tensor([[False, False], [True, False]])
    layout = StepLayout.from_rows(mask, [0, 0], [0, 1], backend="reference")
    steps = oracles.of_layout(layout)
    assert oracles.step_rewards([1.0, 2.0, 4.0, 8.0], [0, 2, 4], steps) == [3.0, 12.0]


@pytest.mark.isa
@examples(
    layout=layouts(),
    seed=st.integers(0, 2**31),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    per_token=st.tuples(st.booleans(), st.booleans()),
    truncated=st.booleans(),
    whiten=st.booleans(),
)
def test_loops(target, layout, seed, gamma, lam, per_token, truncated, whiten):
    generator = torch.Generator().manual_seed(seed)
    steps = oracles.of_layout(layout)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    rewards_per_token, values_per_token = per_token
    rewards = normal(*layout.shape) if rewards_per_token else normal(layout.num_steps)
    values = normal(*layout.shape) if values_per_token else normal(layout.num_steps)
    bootstrap = normal(layout.num_trajectories) if truncated else None
    found = step_gae(
        rewards.to(target.device),
        values.to(target.device),
        layout.to(target.device),
        gamma=gamma,
        lam=lam,
        bootstrap_values=None if bootstrap is None else bootstrap.to(target.device),
        whiten=whiten,
        backend=target.backend,
    )
    reward_of, value_of = rewards.reshape(-1).tolist(), values.reshape(-1).tolist()
    # With as many steps as tokens, a vector of them is read per step: so is it by the package.
    if rewards_per_token and tuple(rewards.shape) != (layout.num_steps,):
        reward_of = oracles.step_rewards(reward_of, layout.row_offsets.tolist(), steps)
    if values_per_token and tuple(values.shape) != (layout.num_steps,):
        value_of = [value_of[position] for position in steps.states]
    after = [0.0] * layout.num_trajectories if bootstrap is None else bootstrap.tolist()
    raw, returns = oracles.gae(reward_of, value_of, steps.trajectories, gamma, lam, after)
    expected = whitened(raw, layout.trajectory_steps.tolist()) if whiten else fp64(raw)
    torch.testing.assert_close(found.returns.cpu(), fp64(returns), rtol=1e-12, atol=1e-12)
    # Whitening divides by a spread that may be small against the advantages.
    torch.testing.assert_close(found.advantages.cpu(), expected, rtol=1e-7, atol=1e-9)
    assert not found.advantages.requires_grad


def test_rewards_outside_of_actions(target):
    """They go to the latest step before them, at the head of a row to its first step."""
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 1]])
    layout = StepLayout.from_mask(mask.to(target.device), backend=target.backend)
    rewards = 10.0 ** torch.arange(21, dtype=torch.float64).reshape(3, 7)
    rewards[0, 4], rewards[2, 3] = torch.nan, torch.inf
    found = step_gae(
        rewards.to(target.device),
        torch.zeros(layout.num_steps, dtype=torch.float64, device=target.device),
        layout,
        gamma=0.0,
        whiten=False,
        backend=target.backend,
    )
    # The row without a step keeps its rewards to itself, and so does a slot that is not finite.
    expected = fp64([1111.0, 1.1e6, 1e14 + 1e15 + 1e16 + 1e18 + 1e19, 1e20])
    torch.testing.assert_close(found.advantages.cpu(), expected, rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fewer_than_two_steps_and_no_spread(target, dtype):
    def advantages(rewards):
        mask = torch.ones((len(rewards), 3), device=target.device)
        layout = StepLayout.from_rows(
            mask, list(range(len(rewards))), [0] * len(rewards), backend=target.backend
        )
        rewards = torch.tensor(rewards, dtype=dtype, device=target.device)
        return step_gae(rewards, rewards * 0, layout, backend=target.backend).advantages.tolist()

    assert advantages([]) == []
    assert advantages([3.5]) == [0.0]
    assert advantages([2.0, 2.0, 2.0, 2.0]) == [0.0] * 4
    assert advantages([1.0, 3.0]) == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-6)


def test_padding_rows_belong_to_no_trajectory(target):
    """They get 0, whatever stands in them, and do not enter the whitening."""
    valid = torch.tensor([True, False, True, True, False], device=target.device)
    mask = torch.ones((5, 2), device=target.device)
    layout = StepLayout.from_rows(
        mask, ["a", "a", "a", "b", "z"], [0, 0, 1, 0, 7], valid=valid, backend=target.backend
    )
    rewards = torch.tensor([1.0, torch.nan, 2.0, 3.0, torch.inf], device=target.device)
    values = torch.tensor([0.5, torch.nan, 0.25, 1.0, -torch.inf], device=target.device)
    found = step_gae(rewards, values, layout, backend=target.backend)
    raw, returns = oracles.gae(
        [1, 0, 2, 3, 0], [0.5, 0, 0.25, 1, 0], [[0, 2], [3]], 0.99, 1.0, [0, 0]
    )
    torch.testing.assert_close(
        found.advantages.cpu(), whitened(raw, [0, 2, 3]).float(), rtol=1e-6, atol=0.0
    )
    torch.testing.assert_close(found.returns.cpu(), fp64(returns).float(), rtol=1e-6, atol=0.0)
    assert found.advantages[[1, 4]].tolist() == found.returns[[1, 4]].tolist() == [0.0, 0.0]


def test_per_token_layout_is_token_level_gae(target):
    """The action tokens of a trajectory, over its rows, form one timeline."""
    rows, length = 6, 9
    mask = ragged_mask(rows, length, generator=torch.Generator().manual_seed(5))
    order = [2, 0, 1, 0, 1, 2]
    groups = ["x", "x", "y", "y", "x", "y"]
    layout = StepLayout.from_rows(
        mask.to(target.device), groups, order, backend=target.backend
    ).per_token()
    batch = random_batch(3, rows, length, mask=mask, dtype=torch.float64, device=target.device)
    found = step_gae(
        torch.where(batch.mask, batch.rewards, 0.0),
        batch.values,
        layout,
        gamma=0.9,
        lam=0.8,
        whiten=False,
        backend=target.backend,
    )
    on_tokens = torch.zeros((rows, length), dtype=torch.float64)
    for name in ("x", "y"):
        members = sorted((k for k in range(rows) if groups[k] == name), key=lambda k: order[k])
        timeline = [(k, t) for k in members for t in range(length) if mask[k, t]]
        ahead_value = ahead = 0.0
        for k, t in reversed(timeline):
            value = float(batch.values[k, t])
            ahead = float(batch.rewards[k, t]) + 0.9 * ahead_value - value + 0.72 * ahead
            ahead_value = value
            on_tokens[k, t] = ahead
    expected = on_tokens.reshape(-1)[layout.token_index.cpu()]
    torch.testing.assert_close(found.advantages.cpu(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[1], [4097], [1, 700, 2, 33, 0, 5]], ids=str)
def test_long_trajectories(target, lengths):
    """Longer than any block of a kernel, with as many steps as tokens."""
    total = sum(lengths)
    rows = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=target.device)
    ones = torch.ones(total, dtype=torch.bool, device=target.device)
    layout = StepLayout.from_mask(ones, cu_seqlens=rows, boundaries=ones, backend=target.backend)
    assert layout.num_steps == total
    generator = torch.Generator().manual_seed(total)
    rewards, values = torch.randn((2, total), dtype=torch.float64, generator=generator)
    bootstrap = torch.randn(len(lengths), dtype=torch.float64, generator=generator)
    found = step_gae(
        rewards.to(target.device),
        values.to(target.device),
        layout,
        lam=0.97,
        bootstrap_values=bootstrap.to(target.device),
        whiten=False,
        backend=target.backend,
    )
    exact = step_gae(
        rewards,
        values,
        layout.to("cpu"),
        lam=0.97,
        bootstrap_values=bootstrap,
        whiten=False,
        backend="reference",
    )
    torch.testing.assert_close(found.advantages.cpu(), exact.advantages, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.returns.cpu(), exact.returns, rtol=1e-11, atol=1e-11)


@pytest.mark.isa
def test_fp32_error_is_at_most_twice_that_of_plain_pytorch(kernel):
    squares = {"kernel": [0.0, 0.0], "reference": [0.0, 0.0]}
    largest = {"kernel": 0.0, "reference": 0.0}
    for seed in range(10 if kernel.interpreted else 30):
        batch = random_batch(seed, rows=6, length=64, mean_step=3.0)

        def run(batch, backend):
            return step_gae(
                batch.rewards,
                batch.values,
                batch.layout,
                lam=0.95,
                bootstrap_values=batch.bootstrap_values,
                backend=backend,
            )

        exact = run(batch.to(torch.float64), "reference")
        for who, found in (
            ("reference", run(batch, "reference")),
            ("kernel", run(batch.to(torch.float32, kernel.device), kernel.backend)),
        ):
            for slot, name in enumerate(("advantages", "returns")):
                error = Error.between(getattr(found, name), getattr(exact, name))
                squares[who][slot] += error.rms**2
                largest[who] = max(largest[who], error.largest)
    for kernel, reference in zip(squares["kernel"], squares["reference"], strict=True):
        assert kernel**0.5 <= 2 * reference**0.5
    # The result itself is rounded, by half an eps of its size.
    assert largest["kernel"] <= 2 * largest["reference"] + _EPS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_fp32(target, dtype):
    batch = random_batch(1, device=target.device)
    found, exact = (
        step_gae(
            batch.rewards.to(dtype).to(as_type),
            batch.values.to(dtype).to(as_type),
            batch.layout,
            backend=target.backend,
        )
        for as_type in (dtype, torch.float32)
    )
    assert found.advantages.dtype == found.returns.dtype == torch.float32
    assert torch.equal(found.advantages, exact.advantages)
    assert torch.equal(found.returns, exact.returns)


def test_rewards_of_rows_without_an_action_are_kept_at_every_level(target):
    """They go to the last action of the trajectory before them, else to the first."""
    mask = torch.tensor([[0, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0]])
    rewards = torch.tensor(
        [[3.0, 0, 0], [0, 0, 0], [5, torch.nan, 0], [0, 0, 1], [7, 0, 0], [9, 0, 0]]
    )
    values = torch.zeros(6, 3)
    # Row 5 is a trajectory that never acts; rows of the other are given out of order.
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    layout = StepLayout.from_rows(
        mask[order].to(target.device), [0, 0, 1, 0, 0, 0], order, backend="reference"
    )
    at = {"rewards": rewards[order].to(target.device), "values": values.to(target.device)}

    def returns(which):
        found = step_gae(**at, layout=which, gamma=1.0, whiten=False, backend=target.backend)
        return found.returns.tolist()

    assert [returns(layout)[i] for i in order.argsort()] == [16, 13, 13, 8, 7, 9]
    per_token = layout.per_token()
    # In the order of memory: rows 1 and 3.
    assert returns(per_token) == [16, 13, 8, 8]
    # A trajectory that never acts keeps its rewards, as its only row does.
    assert returns(layout.per_trajectory()) == [16, 9]
    assert returns(per_token.per_trajectory())[0] == 16
    assert returns(layout.per_trajectory().per_token()) == [16, 13, 8, 8]
    # A copy of a layout gives them to the same steps.
    assert returns(per_token.to("cpu").to(target.device)) == returns(per_token)


def test_equal_advantages_whiten_to_zero(target):
    mask = torch.ones(7, 1, device=target.device, dtype=torch.bool)
    layout = StepLayout.from_mask(mask, backend=target.backend)
    rewards = torch.full((7,), 0.1, device=target.device)
    found = step_gae(rewards, torch.zeros_like(rewards), layout, backend=target.backend)
    assert found.advantages.abs().max() < 1e-6


def test_an_empty_response_keeps_its_reward(target):
    mask = torch.tensor([[1, 1], [0, 0], [1, 1]], device=target.device, dtype=torch.bool)
    layout = StepLayout.from_rows(mask, [0, 0, 0], [0, 1, 2], backend=target.backend)
    rewards = fp64([[0.0, 0.0], [5.0, torch.nan], [0.0, 0.0]], target.device)
    found = step_gae(
        rewards,
        torch.zeros(3, device=target.device, dtype=torch.float64),
        layout,
        gamma=1.0,
        whiten=False,
        backend=target.backend,
    )
    assert found.returns.tolist() == [5.0, 5.0, 0.0]
