"""A program: verl's `run_ppo` with its own task runner, on the toy game.

    python verl_train.py FOLDER [OVERRIDES...]

The folder gets the models, the prompts and `metrics.jsonl`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pandas
import verl
import verl_toy
from hydra import compose, initialize_config_dir
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo

# What a user changes of verl's defaults for StepPO.
STEPPO = """
trainer.v1.trainer_mode=steppo_sync
algorithm.adv_estimator=step_gae
algorithm.gamma=0.99
algorithm.lam=0.95
critic.enable=True
actor_rollout_ref.actor.policy_loss.loss_mode=steppo
actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean
actor_rollout_ref.actor.clip_ratio_low=3e-4
actor_rollout_ref.actor.clip_ratio_high=4e-4
"""
_SIZES = """
data.train_batch_size=8
data.max_prompt_length=32
data.max_response_length=8
data.dataloader_num_workers=0
actor_rollout_ref.rollout.n=4
actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16
actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=16
actor_rollout_ref.actor.ppo_mini_batch_size=8
actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16
actor_rollout_ref.actor.optim.lr=3e-3
critic.ppo_mini_batch_size=8
critic.ppo_micro_batch_size_per_gpu=16
critic.optim.lr=1e-2
trainer.total_epochs=100
trainer.logger=[console,file]
trainer.val_before_train=False
trainer.test_freq=-1
trainer.save_freq=-1
trainer.resume_mode=disable
trainer.nnodes=1
trainer.n_gpus_per_node=1
reward.num_workers=1
"""
_ON_A_CPU = """
trainer.device=cpu
actor_rollout_ref.actor.strategy=fsdp2
actor_rollout_ref.actor.use_dynamic_bsz=False
actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
++actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32
++actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype=fp32
actor_rollout_ref.ref.fsdp_config.use_torch_compile=False
++actor_rollout_ref.model.override_config.attn_implementation=eager
actor_rollout_ref.model.use_remove_padding=False
actor_rollout_ref.model.enable_gradient_checkpointing=False
actor_rollout_ref.rollout.name=cpu
actor_rollout_ref.rollout.nnodes=1
actor_rollout_ref.rollout.calculate_log_probs=False
++actor_rollout_ref.rollout.agent.agent_loop_manager_class=verl_rollouts.Manager
critic.strategy=fsdp2
++critic.model.override_config.attn_implementation=eager
critic.model.use_remove_padding=False
critic.model.enable_gradient_checkpointing=False
++critic.fsdp.use_torch_compile=False
++critic.fsdp.mixed_precision.param_dtype=fp32
ray_kwargs.ray_init.num_cpus=32
++ray_kwargs.ray_init.resources.TRAINER=4
++ray_kwargs.ray_init.include_dashboard=False
++ray_kwargs.ray_init.object_store_memory=300000000
"""


def main(folder: Path, overrides: list[str]) -> None:
    actor, critic = verl_toy.write_models(folder)
    prompts = [
        {
            "data_source": "toy",
            "prompt": [{"role": "user", "content": "go"}],
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": number},
        }
        for number in range(64)
    ]
    data = folder / "prompts.parquet"
    pandas.DataFrame(prompts).to_parquet(data)
    os.environ["VERL_FILE_LOGGER_PATH"] = str(folder / "metrics.jsonl")
    paths = [
        f"data.train_files={data}",
        f"data.val_files={data}",
        f"actor_rollout_ref.model.path={actor}",
        f"critic.model.path={critic}",
    ]
    defaults = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
    with initialize_config_dir(config_dir=defaults, version_base=None):
        settings = (STEPPO + _SIZES + _ON_A_CPU).split()
        config = compose("ppo_trainer", overrides=[*settings, *paths, *overrides])
    run_ppo(config, task_runner_class=TaskRunnerV1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
