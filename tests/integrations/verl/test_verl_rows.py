"""Rows of verl as steps: their order, rewards and advantages, against loops in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steppo_kernels import broadcast_to_tokens
from steppo_kernels.integrations.verl import StepPOTrainerConfig
from steppo_kernels.integrations.verl.estimator import step_gae, trainer_follows
from steppo_kernels.integrations.verl.rows import Rows, Steps

GAMMA, LAM = 0.9, 0.8


def rows(keys, padding=(), extra=None, masked=()) -> Rows:
    mask = torch.ones(len(keys), 3, dtype=torch.long)
    for key in (*padding, *masked):
        mask[keys.index(key)] = 0
    return Rows(keys, [key in padding for key in keys], mask, extra)


def in_loops(keys, rewards, values, ends) -> dict[str, tuple[float, float]]:
    """Advantage and return of each key, trajectory by trajectory; `ends` are the last values."""
    found = {}
    of_trajectory: dict[str, list[str]] = {}
    for key in sorted(keys, key=lambda key: int(key.rsplit("_", 1)[1])):
        of_trajectory.setdefault(key.rsplit("_", 1)[0], []).append(key)
    for name, members in of_trajectory.items():
        following, advantage = ends.get(name, 0.0), 0.0
        for key in reversed(members):
            delta = rewards[key] + GAMMA * following - values[key]
            advantage = delta + GAMMA * LAM * advantage
            following = values[key]
            found[key] = advantage, advantage + values[key]
    return found


# Trajectories in any order, with gaps and more than nine steps; sessions of one prompt apart.
KEYS = ["u_1_4", "u_0_0", "v_0_10", "u_1_0", "v_0_9", "v_0_2", "u_1_7", "padx_0_0", "padx_1_0"]
PADDING = ("padx_0_0", "padx_1_0")


def advantages(steps: Steps, rewards, values, *, whiten: bool = False):
    return steps.advantages(rewards, values, gamma=GAMMA, lam=LAM, whiten=whiten)


def test_gae_runs_over_the_steps_of_a_trajectory_without_gaps_and_padding():
    made = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, len(KEYS), generator=made, dtype=torch.float64)
    steps = Steps.of_rows(rows(KEYS, PADDING), None)
    kept = [key for key in KEYS if key not in PADDING]
    pairs = zip(rewards.tolist(), values.tolist(), strict=True)
    numbers = dict(zip(KEYS, pairs, strict=True))
    wanted = in_loops(kept, {k: numbers[k][0] for k in kept}, {k: numbers[k][1] for k in kept}, {})
    found = advantages(steps, rewards, values)
    for row, key in enumerate(KEYS):
        pair = found.advantages[row].item(), found.returns[row].item()
        assert pair == pytest.approx(wanted.get(key, (0.0, 0.0))), key
    whitened = advantages(steps, rewards, values, whiten=True).advantages
    raw = found.advantages[:7]
    assert torch.allclose(whitened[:7], (raw - raw.mean()) / (raw.std() + 1e-8))
    assert not whitened[7:].any()


def test_the_value_of_a_state_after_a_cut_follows_the_last_step():
    keys = ["u_0_1", "u_0_2", "u_0_0", "w_0_0", "pad_0_0"]
    # Padding is a copy of the first row, with its fields.
    extra = [{}, {"state": True}, {}, {"state": False}, {"state": True}]
    marked = rows(keys, padding=("pad_0_0",), extra=extra, masked=("u_0_2",))
    steps = Steps.of_rows(marked, "state")
    assert steps.is_step.tolist() == [True, False, True, True, False]
    rewards = torch.tensor([1.0, 7.0, 0.0, 2.0, 7.0], dtype=torch.float64)
    values = torch.tensor([0.5, 3.0, 0.25, 1.0, 9.0], dtype=torch.float64)
    numbers = dict(zip(keys, zip(rewards.tolist(), values.tolist(), strict=True), strict=True))
    kept = ["u_0_1", "u_0_0", "w_0_0"]
    wanted = in_loops(
        kept, {k: numbers[k][0] for k in kept}, {k: numbers[k][1] for k in kept}, {"u_0": 3.0}
    )
    found = advantages(steps, rewards, values)
    for key, (advantage, returned) in wanted.items():
        row = keys.index(key)
        assert found.advantages[row].item() == pytest.approx(advantage)
        assert found.returns[row].item() == pytest.approx(returned)
    # Without the key, it is a step like others.
    assert Steps.of_rows(marked, None).is_step.tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("keys", [["u_0_0"], ["u_0_0", "pad_0_0"], ["pad_0_0"]])
def test_one_row_or_none_is_whitened_to_zero(keys):
    steps = Steps.of_rows(rows(keys, padding=[key for key in keys if key[0] == "p"]), None)
    ones = torch.ones(len(keys))
    found = advantages(steps, ones, 0.5 * ones, whiten=True)
    assert found.advantages.tolist() == [0.0] * len(keys)
    assert torch.isfinite(found.returns).all()


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, [1.0, 2.0, 3.0, 4.0, 0.0]),
        ({"rewards": "rm_scores"}, [1.0, 2.0, 3.0, 4.0, 0.0]),
        ({"rewards": "last"}, [0.0, 2.0, 0.0, 4.0, 0.0]),
        ({"rewards": "extra_fields"}, [0.5, 1.5, -1.0, 2.0, 0.0]),
        ({"rewards": "extra_fields", "reward_key": "other"}, [9.0, 8.0, 7.0, 6.0, 0.0]),
    ],
)
def test_rewards_of_steps(config, wanted):
    keys = ["u_0_1", "u_0_3", "u_0_0", "w_0_5", "pad_0_0"]
    numbers = zip((0.5, 1.5, -1.0, 2), (9, 8, 7, 6), strict=True)
    extra = [{"step_reward": one, "other": other} for one, other in numbers]
    steps = Steps.of_rows(rows(keys, padding=("pad_0_0",), extra=[*extra, extra[0]]), None)
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert steps.rewards(scores, StepPOTrainerConfig(**config)).tolist() == wanted


@pytest.mark.parametrize(
    ("rewards", "copied"),
    [
        ([1.0, 1.0, 0.0, 0.0, 3.0, 9.0], True),  # One success, one failure, one of a single step.
        ([1.0, 0.0, 0.0, 0.0, 3.0, 9.0], False),
        ([0.0, 0.0, 0.0, 0.0, 3.0, 9.0], False),  # Failures alone are no evidence.
        ([1.0, 1.0, 2.0, 3.0, 3.0, 9.0], False),
    ],
)
def test_rewards_that_stand_in_every_row_are_noticed(rewards, copied):
    keys = ["u_0_0", "u_0_1", "u_1_0", "u_1_1", "w_0_0", "pad_0_0"]
    steps = Steps.of_rows(rows(keys, padding=("pad_0_0",)), None)
    assert steps.look_copied(torch.tensor(rewards)) is copied


@pytest.mark.parametrize(
    ("keys", "mask", "whole"),
    [
        (["u_0_0", "u_1_0"], [[1, 0, 1], [1, 1, 0]], True),
        (["u_0_0", "u_1_0"], [[0, 1, 1], [1, 1, 0]], False),
        (["u_0_0", "u_0_1"], [[1, 0, 1], [1, 1, 0]], False),
        (["u_0_0", "pad_0_0"], [[0, 1, 1], [1, 0, 1]], False),
    ],
)
def test_whole_trajectories_in_a_row_are_noticed(keys, mask, whole):
    given = Rows(keys, [key.startswith("pad") for key in keys], torch.tensor(mask))
    assert Steps.of_rows(given, None).look_whole() is whole


@pytest.mark.parametrize(
    ("keys", "extra", "masked", "says"),
    [
        (
            ["u_0_0", "u_0_0"],
            None,
            (),
            "step_indices: got step 0 of one trajectory in rows 0",
        ),
        (["u_0_first"], None, (), "keys: got 'u_0_first', expected the trajectory and the index"),
        (["u"], None, (), "keys: got 'u'"),
        (["u_0_0", "u_0_1"], [{}, {"s": True}], (), "response_mask: got action tokens in row"),
    ],
)
def test_rows_that_cannot_be_raise(keys, extra, masked, says):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Steps.of_rows(rows(keys, extra=extra, masked=masked), "s")
    assert str(caught.value).startswith(says)


def test_padding_that_copies_a_row_trains_nothing():
    """As the authors' code appends it: with its key and its mask."""
    copied = Rows(["u_0_0", "u_0_1", "u_0_0"], [False, False, True], torch.ones(3, 3))
    steps = Steps.of_rows(copied, None)
    found = advantages(steps, torch.tensor([0.0, 1.0, 5.0]), torch.tensor([0.5, 0.5, 5.0]))
    alone = Steps.of_rows(rows(["u_0_0", "u_0_1"]), None)
    wanted = advantages(alone, torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]))
    assert torch.equal(found.advantages[:2], wanted.advantages)
    assert found.advantages[2] == found.returns[2] == 0
    assert not broadcast_to_tokens(found.advantages, steps.layout)[2].any()


@pytest.mark.parametrize("index", ["0", "1"])
def test_a_state_that_is_not_the_last_raises(index):
    keys = ["u_0_1", f"{'u_0' if index == '0' else 'w_0'}_{index}"]
    steps = Steps.of_rows(rows(keys, extra=[{}, {"s": True}], masked=keys[1:]), "s")
    with pytest.raises(ValueError, match="expected it behind all steps of its trajectory"):
        advantages(steps, torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("given", [2, 2.0, np.float32(2), np.float64(2), np.int64(2)])
def test_a_reward_is_a_number_of_any_type(given):
    steps = Steps.of_rows(rows(["u_0_0"], extra=[{"step_reward": given}]), None)
    found = steps.rewards(torch.zeros(1), StepPOTrainerConfig(rewards="extra_fields"))
    assert found.tolist() == [2.0]


@pytest.mark.parametrize("given", [None, "1", True, np.bool_(True), np.nan, np.inf])
def test_a_step_without_a_reward_in_its_fields_raises(given):
    steps = Steps.of_rows(rows(["u_0_0"], extra=[{"step_reward": given}]), None)
    with pytest.raises(ValueError, match=r"under 'step_reward' in row 'u_0_0'"):
        steps.rewards(torch.zeros(1), StepPOTrainerConfig(rewards="extra_fields"))


def test_the_estimator_refuses_to_run_without_the_trainer():
    rewards = torch.ones(2, 3)
    options = {"token_level_rewards": rewards, "response_mask": rewards, "config": None}
    with pytest.raises(RuntimeError, match=r"trainer.v1.trainer_mode=steppo_sync"):
        step_gae(**options)
    with trainer_follows():
        assert not step_gae(**options)[0].any()
    with pytest.raises(RuntimeError, match=r"algorithm.adv_estimator: got 'step_gae'"):
        step_gae(**options)
