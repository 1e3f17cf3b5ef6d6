"""A program: verl's TrainingWorker with the FSDP2 engine, on this rank's rows of a batch.

It takes the folder of the models, a file of cases and a file to write their results to. The
environment says which rank it is.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import cpu_platform
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import (
    CriticConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss

from steppo_kernels.integrations.verl import step_critic_loss

ROWS = 16
_PADDING_ROW = 5


def rows(rank: int, world: int) -> dict[str, Any]:
    """The rows of a rank, as nested tensors: several lengths, masks with gaps, one of padding."""
    made = torch.Generator().manual_seed(0)
    columns: dict[str, list[torch.Tensor]] = {}
    for row in range(ROWS):
        prompt, response = (
            int(torch.randint(low, high, (1,), generator=made)) for low, high in ((3, 7), (4, 12))
        )
        ids = torch.randint(4, 16, (prompt + response,), generator=made)
        mask = (torch.rand(response, generator=made) < 0.8).long()
        mask[0] = row != _PADDING_ROW
        if row == _PADDING_ROW:
            mask[:] = 0
        advantage, change, past = torch.randn(3, generator=made).tolist()
        for name, column in {
            "input_ids": ids,
            "position_ids": torch.arange(len(ids)),
            "prompts": ids[:prompt],
            "responses": ids[prompt:],
            "response_mask": mask,
            "loss_mask": mask,
            "advantages": advantage * mask.float(),
            "returns": torch.full((response,), 2 * advantage),
            "values": torch.full((response,), past),
            "ratio": torch.full((response,), 0.03 * change),
        }.items():
            columns.setdefault(name, []).append(column)
    share = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    return {name: nested(column[share]) for name, column in columns.items()}


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def worker(models: Path, case: dict[str, Any]) -> TrainingWorker:
    is_critic = case["loss"] == "critic"
    precision = {"param_dtype": case.get("dtype", "fp32"), "reduce_dtype": "fp32"}
    made = TrainingWorker(
        TrainingWorkerConfig(
            model_type="value_model" if is_critic else "language_model",
            model_config=HFModelConfig(
                path=str(models / ("critic" if is_critic else "actor")),
                use_remove_padding=case.get("remove_padding", False),
                override_config={"attn_implementation": "eager"},
                enable_gradient_checkpointing=False,
            ),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                use_torch_compile=False,
                use_dynamic_bsz=False,
                micro_batch_size_per_gpu=case["micro"],
                infer_micro_batch_size_per_gpu=case["micro"],
                mixed_precision={**precision, "buffer_dtype": "fp32"},
            ),
            optimizer_config=FSDPOptimizerConfig(
                lr=0.01, total_training_steps=10, weight_decay=0.0, clip_grad=1e9
            ),
            checkpoint_config=CheckpointConfig(),
        )
    )
    made.reset()
    return made


def loss_of(case: dict[str, Any]) -> Any:
    if case["loss"] == "critic":
        config = CriticConfig(strategy="fsdp2", ppo_micro_batch_size_per_gpu=1)
        return functools.partial(step_critic_loss, config=config)
    own = "steppo_kernels.integrations.verl.StepPOPolicyLossConfig"
    verls = "verl.workers.config.PolicyLossConfig"
    config = {
        "_target_": "verl.workers.config.FSDPActorConfig",
        "strategy": "fsdp2",
        "rollout_n": 1,
        "ppo_micro_batch_size_per_gpu": case["micro"],
        "clip_ratio_low": 3e-2,
        "clip_ratio_high": 4e-2,
        "loss_agg_mode": case.get("mode", "seq-mean-token-mean"),
        "use_kl_loss": case.get("kl", False),
        "entropy_coeff": case.get("entropy", 0.0),
        "fsdp_config": {"_target_": "verl.workers.config.FSDPEngineConfig"},
        "policy_loss": {
            "_target_": verls if case["loss"] == "gspo" else own,
            "loss_mode": case["loss"],
            **case.get("settings", {}),
        },
    }
    return functools.partial(ppo_loss, config=omega_conf_to_dataclass(OmegaConf.create(config)))


def old_log_probs(made: TrainingWorker, columns: dict[str, Any]) -> torch.Tensor:
    """Those of the worker's own policy, a step of each row off: then ratios are not all 1."""
    ask = {"temperature": 1.0, "pad_token_id": 0, "compute_loss": False, "calculate_entropy": False}
    found = made.infer_batch(tu.get_tensordict(dict(columns), non_tensor_dict=ask))["log_probs"]
    parts = zip(found.unbind(), columns["prompts"].unbind(), columns["ratio"].unbind(), strict=True)
    return nested([row[len(prompt) - 1 : -1] - ratio for row, prompt, ratio in parts])


def result(models: Path, case: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    made = worker(models, case)
    made.set_loss_fn(loss_of(case))
    columns = rows(rank, world)
    if case["loss"] != "critic":
        columns["old_log_probs"] = old_log_probs(made, columns)
        columns["ref_log_prob"] = nested([x + 0.01 for x in columns["old_log_probs"].unbind()])
    data: TensorDict = tu.get_tensordict(
        columns,
        non_tensor_dict={
            "temperature": 1.0,
            "pad_token_id": 0,
            "calculate_entropy": case.get("entropy", 0.0) != 0,
        },
    )
    tu.assign_non_tensor(
        data,
        global_batch_size=ROWS,
        mini_batch_size=ROWS,
        epochs=2,
        seed=1,
        dataloader_kwargs={"shuffle": False},
    )
    metrics = tu.get(made.train_mini_batch(data), "metrics")
    weights = [
        (value.full_tensor() if hasattr(value, "full_tensor") else value).double().sum().item()
        for value in made.engine.module.state_dict().values()
    ]
    numbers = {name: value for name, value in metrics.items() if not name.startswith("perf")}
    return {"metrics": json.loads(json.dumps(numbers, default=float)), "weights": weights}


def main(models: str, cases: str, results: str) -> None:
    cpu_platform._init_process_group()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {
        name: result(Path(models), case, rank, world)
        for name, case in json.loads(Path(cases).read_text()).items()
    }
    if rank == 0:
        Path(results).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
