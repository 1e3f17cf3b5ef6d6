"""It trains: from a reward below 0.5 of 3 to one above 2.5, in less than two minutes each."""

from __future__ import annotations

import time

import letter_game
import pytest
from test_trl_rewards import has_environments

WAYS = {
    "rollout_func": {"rollout": letter_game.play},
    "environment_factory": {
        "environment_factory": letter_game.LetterGame,
        "max_completion_length": 48,
        "generation_kwargs": {"max_new_tokens": 3},
        "max_tool_calling_iterations": 3,
    },
}


@pytest.mark.parametrize("critic", [False, True], ids=["group", "critic"])
@pytest.mark.parametrize(
    "way",
    ["rollout_func", pytest.param("environment_factory", marks=has_environments)],
)
def test_the_reward_rises(way, critic, tmp_path):
    trainer = letter_game.trainer(
        tmp_path,
        max_steps=120,
        per_device_train_batch_size=64,
        num_generations=8,
        logging_steps=5,
        lr_scheduler_type="linear",
        gradient_checkpointing=False,
        # The next letter does not depend on the answer. At the start all answers are tried.
        step_gamma=0.3,
        entropy_coef=0.05,
        step_critic=critic,
        **WAYS[way],
    )
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"{way}, critic {critic}: {rewards[0]:.2f} to {rewards[-1]:.2f} in {seconds:.0f} s")
    assert rewards[0] < 0.5
    assert rewards[-1] > 2.5
    assert seconds < 120
