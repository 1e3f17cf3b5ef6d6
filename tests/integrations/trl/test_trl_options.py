"""Arguments: which of GRPO's are kept, used or refused, and what a step's mean."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

import letter_game
import pytest
import torch
from transformers import HfArgumentParser, MixtralConfig, MixtralForCausalLM
from trl import GRPOConfig

from steppo_kernels import StepPOConfig
from steppo_kernels.integrations.trl import StepPOTrainer, StepPOTrainingArguments, arguments
from steppo_kernels.integrations.trl.options import LOST

# Options of GRPO that this trainer reads itself.
USED = {
    *("beta", "entropy_coef", "epsilon", "epsilon_high", "learning_rate", "reward_weights"),
    *("num_iterations", "scale_rewards", "steps_per_generation", "temperature"),
    *("num_generations", "num_generations_eval", "cast_lm_head_to_fp32", "router_aux_loss_coef"),
    *("use_vllm", "vllm_importance_sampling_correction"),
}
# Those that TRL reads outside of its loss, and that mean the same as ever.
KEPT = {
    *("cache_implementation", "chat_template_kwargs", "disable_dropout", "generation_batch_size"),
    *("ds3_gather_for_generation", "generation_kwargs", "log_completions", "log_multimodal"),
    *("log_completions_hub_repo", "log_unique_prompts", "mask_truncated_completions"),
    *("max_completion_length", "max_tool_calling_iterations", "min_p", "model_init_kwargs"),
    *("num_completions_to_print", "pad_to_multiple_of", "ref_model_mixup_alpha"),
    *("ref_model_sync_steps", "remove_unused_columns", "repetition_penalty", "shuffle_dataset"),
    *("sync_ref_model", "top_k", "top_p", "transformers_continuous_batching_config"),
    *("trust_remote_code", "use_transformers_continuous_batching", "use_transformers_paged"),
    *("vllm_enable_sleep_mode", "vllm_gpu_memory_utilization", "vllm_group_port"),
    *("vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max"),
    *("vllm_importance_sampling_clip_min", "vllm_importance_sampling_mode"),
    *("vllm_max_model_length", "vllm_mode", "vllm_model_impl", "vllm_server_base_url"),
    *("vllm_server_host", "vllm_server_port", "vllm_server_timeout"),
    *("vllm_structured_outputs_regex", "vllm_tensor_parallel_size"),
}
# Another value of each option that is refused.
OTHERS: dict[str, Any] = {
    "loss_type": "grpo",
    "importance_sampling_level": "sequence",
    "delta": 2.0,
    "top_entropy_quantile": 0.2,
    "off_policy_mask_threshold": 0.5,
    "use_bias_correction_kl": True,
    "use_adaptive_entropy": True,
    "entropy_coef_min": 0.1,
    "entropy_coef_max": 0.5,
    "entropy_coef_delta": 0.1,
    "entropy_target": 1.0,
    "sapo_temperature_pos": 2.0,
    "sapo_temperature_neg": 2.0,
    "vespo_k_pos": 1.0,
    "vespo_lambda_pos": 1.0,
    "vespo_k_neg": 1.0,
    "vespo_lambda_neg": 1.0,
    "multi_objective_aggregation": "normalize_then_sum",
}


def test_every_option_of_grpo_is_used_kept_or_refused():
    base = GRPOConfig.__mro__[1]
    own = {one.name for one in fields(GRPOConfig)} - {one.name for one in fields(base)}
    own |= set(GRPOConfig.__annotations__)
    lists = (USED, KEPT, set(LOST))
    assert set.union(*lists) == own
    assert sum(map(len, lists)) == len(own)


@pytest.mark.parametrize("name", LOST)
def test_an_option_that_would_be_lost_raises(name, tmp_path):
    with pytest.raises(ValueError, match=rf"^{name}: got .*, expected the default"):
        letter_game.arguments(tmp_path, **{name: OTHERS[name]})
    # Whoever sets it later is told when the trainer is made.
    args = letter_game.arguments(tmp_path)
    setattr(args, name, OTHERS[name])
    with pytest.raises(ValueError, match=rf"^{name}: got"):
        StepPOTrainer(letter_game.model(), args=args)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "aux loss": ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef: got 0.1, expected 0.0"),
    "weights of what is only logged": ({"reward_weights": [2.0]}, "reward_weights: got"),
    "source": ({"step_reward_source": "turns"}, "step_reward_source: got 'turns', expected one of"),
    "scale": ({"scale_rewards": "step"}, "scale_rewards: got 'step', expected one of"),
    "group of a critic": ({"scale_rewards": "group", "step_critic": True}, "scale_rewards: got"),
    "gamma": ({"step_gamma": 1.5}, "step_gamma: got 1.5, expected a number in"),
    "lam": ({"step_lam": -0.1, "step_critic": True}, "step_lam: got -0.1"),
    "lam without a critic": ({"step_lam": 0.5}, "step_lam: got 0.5 without step_critic"),
    "clip without a critic": ({"step_value_clip": 0.1}, "step_value_clip: got 0.1 without"),
    "coefficient": ({"step_critic": True, "step_value_coef": 0.0}, "step_value_coef: got 0.0"),
    "body without a critic": (
        {"step_value_trains_body": False},
        "step_value_trains_body: got False without step_critic",
    ),
    "epsilon": ({"epsilon": -1.0}, r"epsilon: got -1.0, expected a number in \[0, 1\]"),
    "epsilon of soft": ({"epsilon": 0.2, "step_surrogate": "soft"}, "epsilon: got 0.2 with"),
    "beta": ({"beta": -0.5}, "beta: got -0.5"),
    "ratio": ({"step_ratio": "turn"}, "step_ratio: got 'turn', expected one of"),
    "surrogate": ({"step_surrogate": "ppo"}, "step_surrogate: got 'ppo'"),
    "tv": ({"step_surrogate": "tv"}, "step_ratio: got 'geometric' with the surrogate 'tv'"),
    "pair": ({"step_token_clip": [0.1]}, "step_token_clip: got"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_mean_nothing_raise(name, tmp_path):
    given, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        letter_game.arguments(tmp_path, **given)


OF_TRAINER: dict[str, tuple[dict[str, Any], str]] = {
    "centered, off-policy, in parts": (
        {"step_ratio": "centered", "num_iterations": 2, "gradient_accumulation_steps": 2},
        "step_ratio: got 'centered' with gradient_accumulation_steps 2",
    ),
    "fused where the head cannot": (
        {"step_fused": True, "cast_lm_head_to_fp32": True},
        "model: ",
    ),
    "critic and an optimizer that was made before": (
        {"step_critic": True, "optimizers": (torch.optim.SGD([torch.zeros(1)]), None)},
        "optimizers: got SGD with step_critic, expected None",
    ),
    "critic and unused parameters": (
        {"step_critic": True, "ddp_find_unused_parameters": True},
        "ddp_find_unused_parameters: got True with step_critic",
    ),
}


@pytest.mark.parametrize("name", OF_TRAINER)
def test_a_trainer_refuses(name, tmp_path):
    given, message = OF_TRAINER[name]
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        letter_game.trainer(tmp_path, **given)


def test_arguments_of_grpo_raise(tmp_path):
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="args: got GRPOConfig, expected StepPOTrainingArguments"):
        StepPOTrainer(letter_game.model(), args=args)


def mixture() -> MixtralForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = MixtralConfig(
        vocab_size=len(letter_game.VOCABULARY),
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        router_aux_loss_coef=0.02,
        pad_token_id=0,
        eos_token_id=3,
        **sizes,
    )
    return MixtralForCausalLM(config)


def test_the_loss_of_a_router_raises(tmp_path):
    with pytest.raises(ValueError, match="router_aux_loss_coef: got None with a model whose own"):
        letter_game.trainer(tmp_path, mixture())
    letter_game.trainer(tmp_path, mixture(), router_aux_loss_coef=0.0).train()


def test_every_number_of_the_config_has_an_argument(tmp_path):
    values: dict[str, Any] = {
        "ratio": "product",
        "surrogate": "clip",
        "clip_low": 0.2,
        "clip_high": 0.3,
        "dual_clip": 3.0,
        "token_clip": (0.1, 0.2),
        "soft_temperature": (1.0, 1.05),
        "log_ratio_max": 5.0,
        "reduction": "token_mean",
        "kl_coef": 0.1,
        "kl_estimator": "k2",
        "entropy_coef": 0.01,
    }
    assert set(values) == {one.name for one in fields(StepPOConfig)}
    given = {
        arguments.argument_of(name): list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }
    assert letter_game.arguments(tmp_path, **given).step_config == StepPOConfig(**values)
    assert letter_game.arguments(tmp_path).step_config == StepPOConfig()


def test_bounds_are_both_those_that_are_set_or_both_the_defaults(tmp_path):
    wide = {"step_ratio": "token"}
    for given, expected in (
        ({}, (3e-4, 4e-4)),
        ({"epsilon": 0.2, **wide}, (0.2, 0.2)),
        ({"epsilon": 0.2, "epsilon_high": 0.28, **wide}, (0.2, 0.28)),
        ({"epsilon_high": 5e-4}, (3e-4, 5e-4)),
    ):
        config = letter_game.arguments(tmp_path, **given).step_config
        assert (config.clip_low, config.clip_high) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step_ratio": "token"}, "so narrow bounds"),
        ({"epsilon": 0.2}, "so wide bounds"),
        ({"step_ratio": "token", "epsilon": 0.2}, None),
        ({"step_ratio": "product", "epsilon": 0.2}, None),
        ({"step_surrogate": "soft", "step_ratio": "token"}, None),
        ({}, None),
    ],
)
def test_bounds_of_the_other_kind_of_ratio_warn(given, message, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        letter_game.arguments(tmp_path, **given)
    found = [str(one.message) for one in caught if "epsilon, epsilon_high: got" in str(one.message)]
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


def test_arguments_come_from_a_command_line_and_from_a_dictionary(tmp_path):
    words = "--use_cpu --bf16 False --step_critic --step_ratio product --step_token_clip 0.1 0.2"
    (args,) = HfArgumentParser(StepPOTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), *words.split()]
    )
    assert (args.step_config.ratio, args.step_config.token_clip) == ("product", (0.1, 0.2))
    assert (args.step_critic, args.scale_rewards) == (True, "batch")
    again = StepPOTrainingArguments(
        str(tmp_path), use_cpu=True, bf16=False, step_token_clip=[0.1, 0.2]
    )
    assert again.step_config.token_clip == (0.1, 0.2)
    assert again.to_dict()["step_token_clip"] == [0.1, 0.2]
