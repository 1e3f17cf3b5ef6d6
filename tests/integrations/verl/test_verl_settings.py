"""Settings through hydra, what raises, and what is warned of."""

from __future__ import annotations

import copy
import math
import os
import pickle
import warnings
from dataclasses import fields

import pytest
import torch
import verl
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl_batches import actor, answer, draw

from steppo_kernels import StepPOConfig
from steppo_kernels.integrations.verl import StepPOPolicyLossConfig, StepPOTrainerConfig, steppo

_LOSS = "actor_rollout_ref.actor.policy_loss"
_OWN = f"{_LOSS}._target_=steppo_kernels.integrations.verl.StepPOPolicyLossConfig"
# Fields of StepPOConfig that verl has settings for, by other names.
_OF_VERL = {
    "clip_low": "clip_ratio_low",
    "clip_high": "clip_ratio_high",
    "soft_temperature": "tau_pos",
    "reduction": "loss_agg_mode",
    "kl_coef": "kl_loss_coef",
    "kl_estimator": "kl_loss_type",
    "entropy_coef": "entropy_coeff",
}


def of_command_line(*overrides: str) -> ActorConfig:
    """verl's own defaults with what a command line changes, as its workers read them."""
    folder = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
    needed = (
        "actor_rollout_ref.model.path=none",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.actor.use_dynamic_bsz=False",
    )
    with initialize_config_dir(config_dir=folder, version_base=None):
        config = compose("ppo_trainer", overrides=[*needed, *overrides])
    made = copy.deepcopy(config.actor_rollout_ref.actor)
    return omega_conf_to_dataclass(made)


def test_every_field_of_the_loss_is_a_setting_of_verl_or_of_ours():
    ours = {field.name for field in fields(StepPOPolicyLossConfig)}
    of_actor = {field.name for field in fields(ActorConfig)}
    of_loss = {field.name for field in fields(StepPOConfig)}
    assert of_loss - ours == set(_OF_VERL)
    assert not ours & set(_OF_VERL)
    assert set(_OF_VERL.values()) <= of_actor
    plain = StepPOPolicyLossConfig()
    assert StepPOConfig(**plain.family) == StepPOConfig()


def test_settings_come_through_hydra():
    bounds = ("clip_ratio_low=3e-4", "clip_ratio_high=4e-4", "loss_agg_mode=seq-mean-token-mean")
    found = of_command_line(
        _OWN,
        f"{_LOSS}.loss_mode=steppo",
        f"+{_LOSS}.dual_clip=3",
        f"+{_LOSS}.token_clip=[0.1,0.2]",
        f"+{_LOSS}.rows_are_steps=false",
        *(f"actor_rollout_ref.actor.{bound}" for bound in bounds),
    )
    settings = found.policy_loss
    assert isinstance(settings, StepPOPolicyLossConfig)
    assert (settings.dual_clip, settings.token_clip) == (3, (0.1, 0.2))
    assert settings.rows_are_steps is False
    # To the workers.
    assert pickle.loads(pickle.dumps(settings)) == settings
    answer("steppo", draw(0), found)


@pytest.mark.parametrize("mode", ["steppo", "capo"])
def test_the_loss_mode_alone_is_enough(mode):
    found = of_command_line(f"{_LOSS}.loss_mode={mode}")
    assert type(found.policy_loss) is PolicyLossConfig
    batch = draw(1)
    says = [_CLIP] if mode == "steppo" else []
    assert warned(mode, batch, found) == says  # verl's default bounds are 0.2.
    plain = answer(mode, batch, found)
    ours = answer(mode, batch, of_command_line(_OWN, f"{_LOSS}.loss_mode={mode}"))
    assert plain.loss == ours.loss


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"loss_mode": "gspo"}, "policy_loss.loss_mode: got 'gspo', expected one of 'steppo'"),
        ({"loss_mode": "capo", "ratio": "token"}, "policy_loss.ratio: got 'token'"),
        ({"ratio": "median"}, "ratio: got 'median'"),
        ({"ratio_center": 0.0}, "policy_loss.ratio_center: got 0.0 with the ratio 'geometric'"),
        (
            {"loss_mode": "capo", "ratio_center": "mean"},
            "policy_loss.ratio_center: got str, expected a number",
        ),
        (
            {"loss_mode": "capo", "ratio_center": math.nan},
            "policy_loss.ratio_center: got nan, expected a finite number",
        ),
        ({"ratio": ""}, "ratio: got ''"),
        ({"dual_clip": 0.5}, "dual_clip: got 0.5"),
        ({"surrogate": "tv"}, "ratio: got 'geometric' with the surrogate 'tv'"),
        ({"token_clip": [0.1]}, "token_clip: got 1 of them"),
        ({"rows_are_steps": "no"}, "policy_loss.rows_are_steps: got str"),
    ],
)
def test_settings_that_mean_nothing_raise_in_the_driver(settings, says):
    with pytest.raises((ValueError, TypeError)) as caught:
        StepPOPolicyLossConfig(**settings)
    assert str(caught.value).startswith(says)


def test_unknown_settings_raise():
    with pytest.raises(InstantiationException, match="my_knob"):
        of_command_line(_OWN, f"{_LOSS}.loss_mode=steppo", f"+{_LOSS}.my_knob=1")
    with pytest.raises(InstantiationException, match="dual_clip"):
        of_command_line(f"{_LOSS}.loss_mode=steppo", f"+{_LOSS}.dual_clip=3")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"config": None}, TypeError, "config: got NoneType, expected verl's ActorConfig"),
        ({"loss_agg_mode": "mean"}, ValueError, "loss_agg_mode: got 'mean'"),
        (
            {"response_mask": torch.ones(12, 19)},
            ValueError,
            "response_mask: got shape (12, 19), expected that of log_prob",
        ),
        ({"response_mask": torch.full((12, 20), 2)}, ValueError, "response_mask: got"),
        ({"advantages": torch.ones(12)}, ValueError, "advantages: got shape (12,)"),
        ({"rollout_is_weights": torch.ones(12, 1)}, ValueError, "rollout_is_weights: got shape"),
        ({"old_log_prob": torch.zeros(20, 12)}, ValueError, "old_log_probs: got"),
    ],
)
def test_wrong_arguments_raise(change, error, says):
    given = draw(2)._asdict() | {"loss_agg_mode": "token-mean", "config": actor()} | change
    with pytest.raises(error) as caught:
        steppo(**given)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_ranks_without_the_count_of_the_mini_batch_raise(mode):
    with pytest.raises(ValueError, match=r"global_batch_info: got no '.*' with 2 ranks"):
        answer("steppo", draw(2), actor(mode, {"dp_size": 2}))


@pytest.mark.parametrize(("called", "set_to"), [("capo", "steppo"), ("steppo", "capo")])
def test_settings_of_the_other_loss_raise(called, set_to):
    config = actor(loss=StepPOPolicyLossConfig(loss_mode=set_to))
    with pytest.raises(ValueError, match=f"policy_loss.loss_mode: got '{set_to}' in a call of"):
        answer(called, draw(2), config)


def test_a_scale_of_zero_raises():
    counts = {"dp_size": 1, "global_batch_size": 12, "loss_scale_factor": 0}
    with pytest.raises(ValueError, match="normalizer: got 0"):
        answer("steppo", draw(2), actor("seq-mean-token-sum-norm", counts))


def warned(name: str, batch, config: ActorConfig) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer(name, batch, config)
    return [str(one.message).partition(":")[0] for one in caught]


_CLIP = "actor.clip_ratio_low, actor.clip_ratio_high"
_CENTER = "policy_loss.ratio_center"
_WIDTH = "actor.loss_scale_factor"
_PART = {"dp_size": 1, "batch_num_tokens": 500, "global_batch_size": 24}
_SUMS = {"mode": "seq-mean-token-sum-norm"}


@pytest.mark.parametrize(
    ("name", "settings", "options", "dtype", "says"),
    [
        ("steppo", {}, {"low": 3e-4, "high": 4e-4}, torch.float32, []),
        ("steppo", {}, {"low": 0.2, "high": 0.2}, torch.float32, [_CLIP]),
        ("steppo", {"ratio": "token"}, {"low": 0.2, "high": 0.2}, torch.float32, []),
        ("steppo", {}, {}, torch.bfloat16, ["log_prob, old_log_prob"]),
        ("steppo", {}, _SUMS, torch.float32, []),
        ("steppo", {}, _SUMS | {"mini_batch": _PART}, torch.float32, [_WIDTH]),
        (
            "steppo",
            {},
            _SUMS | {"mini_batch": _PART | {"loss_scale_factor": 20}},
            torch.float32,
            [],
        ),
        ("capo", {}, {}, torch.float32, []),
        ("capo", {}, {"mini_batch": _PART}, torch.float32, [_CENTER]),
        ("capo", {"ratio_center": 0.0}, {"mini_batch": _PART}, torch.float32, []),
        ("steppo", {}, {"mini_batch": _PART}, torch.float32, []),
    ],
)
def test_what_is_rarely_meant_is_warned_of(name, settings, options, dtype, says):
    config = actor(loss=StepPOPolicyLossConfig(loss_mode=name, **settings), **options)
    assert warned(name, draw(3).to(dtype), config) == says


@pytest.mark.parametrize("name", ["log_prob", "old_log_prob"])
def test_either_policy_may_be_rounded(name):
    batch = draw(3)
    rounded = batch._replace(**{name: getattr(batch, name).bfloat16()})
    assert warned("steppo", rounded, actor()) == [name]


@pytest.mark.parametrize(
    ("node", "error", "says"),
    [
        ({"rewards": "first"}, ValueError, "rewards: got 'first'"),
        ({"reward_key": 3}, TypeError, "reward_key: got int"),
        ({"reward_key": "mine"}, ValueError, "reward_key: got 'mine' with rewards=None"),
        (
            {"reward_key": "mine", "rewards": "last"},
            ValueError,
            "reward_key: got 'mine' with rewards=last, expected rewards=extra_fields",
        ),
        ({"whiten": "yes"}, TypeError, "whiten: got str"),
        ({"gamma": 0.9}, ValueError, "trainer.v1.steppo_sync: got gamma, expected"),
    ],
)
def test_wrong_settings_of_the_trainer_raise(node, error, says):
    with pytest.raises(error) as caught:
        StepPOTrainerConfig.of_node("steppo_sync", node)
    assert str(caught.value).startswith(says)


def test_the_trainers_node_may_hold_what_verl_reads_from_it():
    found = StepPOTrainerConfig.of_node("steppo_sync", {"parameter_sync_step": 1, "whiten": False})
    assert found == StepPOTrainerConfig(whiten=False)
