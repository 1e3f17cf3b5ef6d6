"""verl's whole V1 trainer on Ray, with `steppo_sync`: every part but the rollouts is its own."""

from __future__ import annotations

import json
import math
import os
from typing import Any, NamedTuple

import pytest
import torch
import verl
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl_processes import train
from verl_train import STEPPO

from steppo_kernels.integrations.verl import (
    StepPOTrainerConfig,
    StepPOTrainerSync,
    StepTrainerMixin,
)
from steppo_kernels.integrations.verl.rows import Rows, Steps

GAMMA, LAM = 0.99, 0.95
# Trajectories of an update, and the multiple that verl pads the rows of an update to.
TRAJECTORIES, MULTIPLE = 32, 32


class Run(NamedTuple):
    """What a run left: metrics of each update, the rows of the last one, its output."""

    metrics: list[dict[str, Any]]
    rows: dict[str, Any]
    output: str


def run(folder, *overrides: str) -> Run:
    output = train(folder, *overrides)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line)["data"] for line in lines]
    return Run(metrics, torch.load(folder / "rows.pt", weights_only=False), output)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Run:
    """Ten updates with nothing but the lines that the page on verl names."""
    return run(tmp_path_factory.mktemp("plain"), "trainer.total_training_steps=10")


@pytest.fixture(scope="module")
def with_all(tmp_path_factory) -> Run:
    """Two ranks, rewards of steps, cut trajectories, KL in the rewards, rollout correction."""
    return run(
        tmp_path_factory.mktemp("all"),
        "trainer.total_training_steps=2",
        "trainer.n_gpus_per_node=2",
        "+trainer.v1.steppo_sync.rewards=extra_fields",
        "+trainer.v1.steppo_sync.bootstrap_key=is_state",
        "algorithm.use_kl_in_reward=True",
        "algorithm.kl_ctrl.kl_coef=0.1",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        "algorithm.rollout_correction.rollout_is=token",
        "algorithm.rollout_correction.rollout_rs=seq_mean_k3",
        "algorithm.rollout_correction.rollout_rs_threshold=1e-3",
    )


@pytest.mark.parametrize(("name", "updates"), [("plain", 10), ("with_all", 2)])
def test_every_update_has_the_metrics_of_steps(name, updates, request):
    found = request.getfixturevalue(name)
    assert len(found.metrics) == updates
    for metrics in found.metrics:
        assert metrics["step/num_trajectories"] == TRAJECTORIES
        num_steps, states = metrics["step/num_steps"], metrics["step/truncated_trajectories"]
        assert TRAJECTORIES <= num_steps <= 3 * TRAJECTORIES
        assert (states > 0) == (name == "with_all")
        rows = math.ceil((num_steps + states) / MULTIPLE) * MULTIPLE
        assert metrics["step/padding_fraction"] == pytest.approx(1 - (num_steps + states) / rows)
        assert metrics["actor/grad_norm"] > 0
        assert metrics["critic/vf_loss"] > 0
        assert 0 < metrics["actor/step_clip_fraction"] < 1
        numbers = [value for value in metrics.values() if isinstance(value, float)]
        assert all(map(math.isfinite, numbers))


@pytest.mark.parametrize("name", ["plain", "with_all"])
def test_advantages_and_returns_are_those_of_loops(name, request):
    rows = request.getfixturevalue(name).rows
    wanted = in_loops(rows)
    flat = torch.tensor([advantage for advantage, _ in wanted.values()])
    for row, key in enumerate(rows["keys"]):
        mask = rows["response_mask"][row].bool()
        advantages, returns = rows["advantages"][row], rows["returns"][row]
        assert not advantages[~mask].any()
        if key not in wanted:
            assert not advantages.any()
            assert not returns.any()
            continue
        advantage, returned = wanted[key]
        whitened = (advantage - flat.mean()) / (flat.std() + 1e-8)
        assert advantages[mask].tolist() == pytest.approx([whitened.item()] * int(mask.sum()), 1e-4)
        assert returns.tolist() == pytest.approx([returned] * len(mask), 1e-4)


def test_steps_whose_tokens_verl_rejects_stay_in_their_trajectories(with_all):
    """verl masks them: they have rewards and values, and train nothing."""
    for metrics in with_all.metrics:
        assert 0 < metrics["rollout_corr/rollout_rs_masked_fraction"] < 1
        assert metrics["rollout_corr/rollout_is_std"] > 0
    rows, wanted = with_all.rows, in_loops(with_all.rows)
    at = {key: row for row, key in enumerate(rows["keys"])}
    rejected = [key for key in wanted if not rows["response_mask"][at[key]].any()]
    assert rejected
    for key in rejected:
        assert not rows["advantages"][at[key]].any()


def in_loops(rows: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Raw advantage and return of each step, by its key, from what verl and the rollouts wrote."""
    at = {key: row for row, key in enumerate(rows["keys"])}
    trajectories: dict[str, list[tuple[int, str]]] = {}
    for key, is_padding in zip(rows["keys"], rows["is_padding"], strict=True):
        if not is_padding:
            name, index = key.rsplit("_", 1)
            trajectories.setdefault(name, []).append((int(index), key))
    found = {}
    for members in trajectories.values():
        following, advantage = 0.0, 0.0
        for _, key in sorted(members, reverse=True):
            row, fields = at[key], rows["extra_fields"][at[key]]
            value = rows["values"][row][0].item()
            if fields.get("is_state"):
                following = value
                continue
            reward = rows["rm_scores"][row].sum().item()
            if "token_level_rewards" in rows:
                # Scores are copies of the last one then: only the KL penalty is taken from them.
                penalty = rows["token_level_rewards"][row].sum().item() - reward
                assert penalty != 0
                reward = fields["step_reward"] + penalty
            delta = reward + GAMMA * following - value
            advantage = delta + GAMMA * LAM * advantage
            following = value
            found[key] = advantage, advantage + value
    assert len(trajectories) == TRAJECTORIES
    assert len(found) > len(trajectories)
    return found


def test_padding_that_weakens_the_update_is_warned_of_once(plain):
    assert any(metrics["step/padding_fraction"] > 0.1 for metrics in plain.metrics)
    assert plain.output.count("UserWarning: ppo_mini_batch_size: got padding") == 1
    assert "trainer.v1.steppo_sync.rewards: got none" not in plain.output


def test_it_is_a_synchronous_trainer_for_verl():
    """Modes of other names get the replay buffer and the prompts of asynchronous ones."""
    folder = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
    with initialize_config_dir(config_dir=folder, version_base=None):
        config = compose("ppo_trainer", overrides=STEPPO.split())
    made = StepPOTrainerSync(config)
    assert made.trainer_mode == "sync"
    assert type(made.replay_buffer) is ReplayBuffer
    assert (made.parameter_sync_step, made.step_config) == (1, StepPOTrainerConfig())


def test_padding_weakens_the_critic_in_every_mode():
    steps = Steps.of_rows(Rows(["u_0_0", "x_0_0"], [False, True], torch.ones(2, 1)), None)
    numbers, trainer = torch.zeros(2), object.__new__(StepTrainerMixin)
    trainer.config = OmegaConf.create(
        {"actor_rollout_ref": {"actor": {"loss_agg_mode": "token-mean"}}}
    )
    trainer._warned_of = set()
    found = steps.advantages(numbers, numbers, gamma=1.0, lam=1.0, whiten=False)
    with pytest.warns(UserWarning, match="ppo_mini_batch_size: got padding for 50%"):
        trainer._step_metrics(steps, numbers, numbers, found)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"algorithm": {"adv_estimator": "gae"}}, "algorithm.adv_estimator: got 'gae'"),
        ({"critic": {"enable": False}}, "critic.enable: got False"),
        ({"critic": {"enable": None}}, "critic.enable: got None"),
        ({"trainer": {"v1": {"steppo_sync": {"lam": 1}}}}, "trainer.v1.steppo_sync: got lam"),
    ],
)
@pytest.mark.filterwarnings("ignore:Disabled critic")
def test_settings_that_do_not_go_with_it_raise(change, says):
    fits = {
        "algorithm": {"adv_estimator": "step_gae"},
        "critic": {"enable": True},
        "trainer": {"v1": {"trainer_mode": "steppo_sync"}},
    }
    config = OmegaConf.merge(fits, change)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        StepPOTrainerSync(config)
    assert str(caught.value).startswith(says)
