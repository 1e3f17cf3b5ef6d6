"""`keep`: a layout without some of its tokens, in which steps keep their place and rewards."""

from __future__ import annotations

import itertools

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steppo_kernels import StepLayout, StepPOConfig, step_gae, steppo_loss


def lines_of(layout: StepLayout) -> list[list[int]]:
    """The flat positions of each trajectory in time order, for a layout whose rows are in one."""
    rows = layout.row_offsets.tolist()
    order = layout.step_rows[layout.trajectory_steps].tolist()
    offsets = layout.trajectory_offsets.tolist()
    lines = []
    for begin, end in itertools.pairwise(offsets):
        members = list(dict.fromkeys(order[begin:end]))
        lines.append([p for row in members for p in range(rows[row], rows[row + 1])])
    return lines


@st.composite
def layouts(draw):
    num_rows, length = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = torch.tensor(draw(st.lists(flags, min_size=num_rows, max_size=num_rows)))
    if draw(st.booleans()):
        return StepLayout.from_mask(mask)
    groups = draw(st.lists(st.integers(0, 2), min_size=num_rows, max_size=num_rows))
    order = draw(st.permutations(range(num_rows)))
    valid = draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows))
    return StepLayout.from_rows(mask, groups, list(order), valid=torch.tensor(valid))


def without(steps: oracles.Steps, kept: list[bool]) -> oracles.Steps:
    tokens = [[position for position in step if kept[position]] for step in steps.tokens]
    return oracles.Steps(tokens, steps.trajectories, steps.states)


@given(layout=layouts(), data=st.data())
@settings(max_examples=60)
def test_steps_keep_their_place(layout, data):
    size = layout.step_ids.numel()
    kept = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    mask = torch.tensor(kept).view(layout.shape)
    for base in (layout, layout.per_trajectory(), layout.per_token()):
        found = base.keep(mask)
        steps = oracles.of_layout(base)
        if base is not layout:
            # In time order, which flat positions do not tell.
            bounds = base.step_offsets.tolist()
            index = base.token_index.tolist()
            steps.tokens = [index[a:b] for a, b in itertools.pairwise(bounds)]
        oracles.assert_layout(found, layout.shape, without(steps, kept))
        assert found.keep(mask.int()).tensors().keys() == found.tensors().keys()
        wanted = [
            row if length == 0 else torch.searchsorted(layout.row_offsets, first, right=True) - 1
            for row, length, first in zip(
                base.step_rows.tolist(),
                found.step_lengths.tolist(),
                [found.token_index[a : a + 1] for a in found.step_offsets[:-1].tolist()],
                strict=True,
            )
        ]
        assert found.step_rows.tolist() == [int(row) for row in wanted]


@given(layout=layouts(), data=st.data())
@settings(max_examples=60)
def test_every_reward_reaches_the_step_that_it_reached_before(layout, data):
    size = layout.step_ids.numel()
    kept = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    mask = torch.tensor(kept).view(layout.shape)
    rewards = torch.arange(1.0, size + 1).view(layout.shape)

    def returns(which):
        values = torch.zeros(layout.shape)
        return step_gae(rewards, values, which, gamma=0.5, whiten=False).returns

    for base in (layout, layout.per_trajectory(), layout.per_token()):
        assert torch.equal(returns(base.keep(mask)), returns(base))


@given(layout=layouts(), data=st.data())
@settings(max_examples=60)
def test_tokens_of_what_was_kept_take_the_rewards_around_them(layout, data):
    """Those before the next kept token of the row; of a row without one, of the trajectory."""
    size = layout.step_ids.numel()
    kept = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    found = layout.keep(torch.tensor(kept).view(layout.shape)).per_token()
    number = {position: step for step, position in enumerate(found.token_index.tolist())}
    rows = layout.row_offsets.tolist()
    sums = [0.0] * found.num_steps
    for line in lines_of(layout):
        for position in line:
            row = next(r for r in range(len(rows) - 1) if rows[r] <= position < rows[r + 1])
            for around in (range(rows[row], rows[row + 1]), line):
                places = list(around)
                at = places.index(position)
                before = [p for p in places[: at + 1] if p in number]
                after = [p for p in places[at:] if p in number]
                if before or after:
                    sums[number[before[-1] if before else after[0]]] += position + 1
                    break
    rewards = torch.arange(1.0, size + 1).view(layout.shape)
    got = step_gae(rewards, torch.zeros(layout.shape), found, gamma=0.0, whiten=False).returns
    assert got.tolist() == sums


def test_a_loss_without_the_tokens_that_were_dropped(target):
    """As if they had never been actions, but that a step may be empty."""
    device, backend = target.device, target.backend
    mask = torch.tensor([[1, 1, 1, 0, 1], [0, 1, 1, 1, 1]], device=device)
    kept = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 1, 0]], device=device, dtype=torch.bool)
    layout = StepLayout.from_mask(mask, backend=backend)
    old = torch.linspace(-1.0, -0.2, 10, device=device).view(2, 5)
    # What was dropped may hold anything.
    log_probs = torch.where(kept, old * 1.001, torch.nan).requires_grad_()
    advantages = torch.tensor([1.0, 7.0, -2.0], device=device)
    config = StepPOConfig(clip_low=0.2, clip_high=0.2)
    out = steppo_loss(log_probs, old, advantages, layout.keep(kept), config=config, backend=backend)
    out.loss.backward()
    ids = torch.tensor([[0, -1, 0, -1, -1], [-1, 1, 1, 1, -1]], device=device)
    other = StepLayout.from_step_ids(ids, backend=backend)
    again = log_probs.detach().requires_grad_()
    wanted = steppo_loss(again, old, advantages[[0, 2]], other, config=config, backend=backend)
    wanted.loss.backward()
    assert torch.equal(out.loss, wanted.loss)
    assert torch.equal(log_probs.grad, again.grad)
    assert out.metrics.as_dict() == wanted.metrics.as_dict()


def test_masks_that_keep_takes():
    layout = StepLayout.from_mask(torch.ones(2, 3))
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    wanted = layout.keep(mask.bool()).step_ids
    for form in (mask, mask.float(), mask.view(-1), mask[None], (mask * 255).byte().view(-1) > 0):
        assert torch.equal(layout.keep(form).step_ids, wanted)
    for wrong, text in (
        (mask.t(), r"shape \(3, 2\)"),
        (mask * 2, "the value 2"),
        (mask.tolist(), "list"),
        (None, "NoneType"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^mask: got {text}.*expected"):
            layout.keep(wrong)
