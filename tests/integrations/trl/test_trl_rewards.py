"""Rewards of steps, from rollouts and environments, and the advantages made of them."""

from __future__ import annotations

import math
from typing import Any

import letter_game
import pytest
import torch
import transformers
from oracle import OracleLayout, step_gae
from packaging.version import Version

from steppo_kernels import StepLayout
from steppo_kernels.integrations.trl import StepSamples, loss, rewards
from steppo_kernels.integrations.trl.rewards import StepRewards, by_source, checked_rollout

has_environments = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.2"), reason="TRL's environments need 5.2"
)


class Holds:
    """An environment, as far as rewards are concerned."""

    def __init__(self) -> None:
        self.step_rewards: list[Any] = []


def of_messages(*given: list[float], runs: int) -> Any:
    """Return the rewards of steps where those of each message are appended after it."""
    environment, found = Holds(), StepRewards()
    for appended in given:
        found.note_message([environment])
        environment.step_rewards += appended
    found.note_message([environment])
    return found.of_steps([runs])


@pytest.mark.parametrize(
    ("given", "runs", "expected"),
    [
        # A last message without a call, as TRL's loop ends.
        ([[1.0], [2.0], []], 3, [1.0, 2.0, 0.0]),
        # The result of the last call was too long: no message follows it.
        ([[1.0], [2.0]], 2, [1.0, 2.0]),
        # Two calls in one message, and a call that failed before there was a reward.
        ([[1.0, 0.5], [], [4.0]], 3, [1.5, 0.0, 4.0]),
        # A completion ended before the others.
        ([[1.0], [], [], []], 2, [1.0, 0.0]),
        # A truncated completion is masked, and has no step.
        ([[1.0], [2.0]], 0, []),
    ],
)
def test_what_comes_between_messages_belongs_to_the_first(given, runs, expected):
    assert of_messages(*given, runs=runs) == [expected]


def of_rollout(given: Any, runs: list[int]) -> Any:
    found = StepRewards()
    found.note_rollout({} if given is None else {"step_rewards": given})
    return found.of_steps(runs)


def test_rewards_of_a_rollout():
    assert of_rollout([[1, 2.0], None, [0.5]], [2, 3, 0]) == [[1.0, 2.0], None, [0.5]]


@pytest.mark.parametrize(
    ("given", "runs", "message"),
    [
        (None, [1], "step_reward_source: got 'steps' or 'both' without step_rewards"),
        ([[1.0]], [1, 1], "step_rewards: got 1 lists, expected one for each of 2 completions"),
        ([[1.0, 2.0]], [1], "step_rewards: got 2 of completion 0, expected 1, one for each run"),
        ([[math.nan]], [1], "step_rewards: got nan in completion 0, expected finite numbers"),
    ],
)
def test_wrong_rewards_of_a_rollout_raise(given, runs, message):
    with pytest.raises(ValueError, match=message):
        of_rollout(given, runs)


def test_wrong_rewards_of_environments_raise():
    environment, found = Holds(), StepRewards()
    environment.step_rewards += [1.0]
    found.note_message([environment])
    found.note_message([environment])
    with pytest.raises(ValueError, match="got 1 of environment 0 right after its reset"):
        found.of_steps([1])
    found.clear()
    environment.step_rewards.clear()
    found.note_message([environment])
    found.note_message([environment])
    environment.step_rewards += [1.0]
    with pytest.raises(ValueError, match="got 1 more of environment 0 while its reward was asked"):
        found.of_steps([1])
    environment.step_rewards = (1.0,)
    with pytest.raises(TypeError, match="step_rewards: got tuple of Holds, expected a list"):
        found.note_message([environment])
    with pytest.raises(ValueError, match="after 2 messages, expected those of its 1 steps"):
        of_messages([1.0], [2.0], runs=1)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("steps", [[1.0, 2.0], [3.0], None, []]),
        ("final", [[0.0, 10.0], None, [30.0], []]),
        ("both", [[1.0, 12.0], None, None, []]),
    ],
)
def test_sources(source, expected):
    given = [[1.0, 2.0], [3.0], None, []]
    scores = [10.0, math.nan, 30.0, 40.0]
    assert by_source(source, given, [2, 1, 1, 0], scores) == expected


def test_an_infinite_score_raises():
    with pytest.raises(ValueError, match="reward_funcs: got inf for completion 1, expected finite"):
        by_source("final", [], [1, 1], [1.0, math.inf])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"completion_ids": [[1], []]}, "completion_ids: got no token in completion 1"),
        ({"completion_ids": [[1]], "env_mask": [[1, 0]]}, r"env_mask: got rows of \[2\] entries"),
        ({"completion_ids": [[1]], "logprobs": [[]]}, r"logprobs: got rows of \[0\] entries"),
    ],
)
def test_what_trl_would_fail_of_raises_with_a_name(output, message):
    with pytest.raises(ValueError, match=message):
        checked_rollout(lambda prompts, trainer: output)([], None)


def test_the_reward_function_of_its_own():
    assert rewards.sum_of_step_rewards(step_rewards=[[1.0, 2.0], None], other=1) == [3.0, None]
    held = Holds()
    held.step_rewards += [1.0, 0.5]
    assert rewards.sum_of_step_rewards(environments=[held]) == [1.5]
    # TRL adds that reward by itself.
    held.get_reward = lambda: 1.5
    assert rewards.sum_of_step_rewards(environments=[held]) == [None]
    with pytest.raises(ValueError, match="reward_funcs: got None without step_rewards"):
        rewards.sum_of_step_rewards(environments=[object()])


# Advantages of a real trainer's batch, by loops.


def batch_of(trainer: Any, rows: int = 8) -> dict[str, Any]:
    trainer.model.train()
    return trainer._generate_and_score_completions(
        [trainer.train_dataset[row] for row in range(rows)]
    )


def steps_of(batch: dict[str, Any], name: str) -> list[list[float]]:
    """Return what each step of each row has, and that all of its tokens have the same."""
    mask = batch["completion_mask"] * batch["tool_mask"]
    layout = OracleLayout.from_mask(mask.flatten().tolist(), tuple(mask.shape))
    values = batch[name].flatten().tolist()
    found: list[list[float]] = []
    for trajectory in layout.trajectories:
        found.append([])
        for step in trajectory:
            of_tokens = {values[at] for at in layout.steps[step]}
            assert len(of_tokens) == 1 or all(map(math.isnan, of_tokens))
            found[-1].append(of_tokens.pop())
    assert all(
        value == 0 for value, flag in zip(values, mask.flatten().tolist(), strict=True) if not flag
    )
    return found


def scripted_rewards(rows: int) -> list[list[float]]:
    script = letter_game.Scripted()

    class Alone:
        accelerator = type("One", (), {"process_index": 0, "num_processes": 1})

    return script([None] * rows, Alone)["step_rewards"]


def returns_of(given: list[list[float]], gamma: float) -> list[list[float]]:
    return [
        [sum(gamma**k * reward for k, reward in enumerate(row[t:])) for t in range(len(row))]
        for row in given
    ]


def deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((one - mean) ** 2 for one in values) / (len(values) - 1))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_returns_relative_to_their_group(scale, tmp_path):
    trainer = letter_game.trainer(tmp_path, scale_rewards=scale, step_gamma=0.9)
    found = steps_of(batch_of(trainer), "advantages")
    returns = returns_of(scripted_rewards(8), 0.9)
    every = [one for row in returns for one in row]
    for first in (0, 4):
        group = [one for row in returns[first : first + 4] for one in row]
        mean = sum(group) / len(group)
        scales = {"group": deviation(group), "batch": deviation(every), "none": 1 - 1e-4}
        for row in range(first, first + 4):
            expected = [(one - mean) / (scales[scale] + 1e-4) for one in returns[row]]
            assert found[row] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def final(completion_ids: Any, **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


@pytest.mark.parametrize("source", ["final", "both"])
def test_the_reward_of_a_completion_falls_to_its_last_step(source, tmp_path):
    trainer = letter_game.trainer(
        tmp_path,
        step_reward_source=source,
        step_gamma=0.5,
        scale_rewards="none",
        reward_funcs=[final],
        reward_weights=[0.1],
    )
    batch = batch_of(trainer)
    found = steps_of(batch, "advantages")
    given = scripted_rewards(8)
    lengths = batch["completion_mask"].sum(1).tolist()
    at_end = [
        [(source == "both") * one for one in row[:-1]] + [(source == "both") * row[-1] + 0.1 * n]
        for row, n in zip(given, lengths, strict=True)
    ]
    returns = returns_of(at_end, 0.5)
    for first in (0, 4):
        group = [one for row in returns[first : first + 4] for one in row]
        for row in range(first, first + 4):
            expected = [one - sum(group) / len(group) for one in returns[row]]
            assert found[row] == pytest.approx(expected, rel=1e-5, abs=1e-6)


class SomeUnscored(letter_game.Scripted):
    """A rollout whose completion 1 and 6 have no score."""

    def __call__(self, prompts: Any, trainer: Any) -> Any:
        output = super().__call__(prompts, trainer)
        for row in (1, 6):
            output["step_rewards"][row] = None
        return output


@pytest.mark.parametrize("critic", [False, True])
def test_a_completion_without_a_score_has_no_advantage_and_is_in_no_group(critic, tmp_path):
    options = {"step_critic": critic, "step_gamma": 1.0, "scale_rewards": "none"}
    trainer = letter_game.trainer(tmp_path, rollout=SomeUnscored(), **options)
    batch = batch_of(trainer)
    found = steps_of(batch, "advantages")
    given = scripted_rewards(8)
    returns = returns_of(given, 1.0)
    for row in range(8):
        if row in (1, 6):
            assert set(found[row]) == {0.0}
            continue
        members = [k for k in range(4 * (row // 4), 4 * (row // 4) + 4) if k not in (1, 6)]
        group = [one for k in members for one in returns[k]]
        # Values are 0 before the first update, and there is no group with a critic.
        mean = 0.0 if critic else sum(group) / len(group)
        assert found[row] == pytest.approx([one - mean for one in returns[row]], abs=1e-5)
    if critic:
        assert all(map(math.isnan, steps_of(batch, loss.RETURNS)[1]))
    loss_ = trainer._compute_loss(trainer.model, batch)
    loss_.backward()
    assert all(
        one.grad.isfinite().all() for one in trainer.model.parameters() if one.grad is not None
    )


def test_gae_and_returns_are_those_of_loops(tmp_path):
    options = {"step_gamma": 0.9, "step_lam": 0.8}
    trainer = letter_game.trainer(tmp_path, step_critic=True, **options)
    head = trainer.model.steppo_value_head
    torch.manual_seed(5)
    torch.nn.init.normal_(head.weight)
    torch.nn.init.constant_(head.bias, 0.3)
    batch = batch_of(trainer)
    values, given = [], scripted_rewards(8)
    mask = batch["completion_mask"] * batch["tool_mask"]
    layout = StepLayout.from_mask(mask)
    values = batch[loss.OLD_VALUES].flatten()[layout.state_index].tolist()
    assert len(set(values)) > 4
    exact = step_gae(
        [one for row in given for one in row],
        values,
        OracleLayout.from_mask(mask.flatten().tolist(), tuple(mask.shape)),
        gamma=0.9,
        lam=0.8,
    )
    flat = {
        name: [one for row in steps_of(batch, name) for one in row]
        for name in ("advantages", loss.RETURNS)
    }
    assert flat["advantages"] == pytest.approx(exact.advantages, rel=1e-4, abs=1e-5)
    assert flat[loss.RETURNS] == pytest.approx(exact.returns, rel=1e-5, abs=1e-5)


def test_advantages_of_ones_own(tmp_path):
    seen: list[StepSamples] = []

    def own(samples: StepSamples) -> torch.Tensor:
        seen.append(samples)
        return samples.rewards * 2

    trainer = letter_game.trainer(tmp_path, advantage_func=own)
    found = steps_of(batch_of(trainer), "advantages")
    for row, expected in zip(found, scripted_rewards(8), strict=True):
        assert row == pytest.approx([2 * one for one in expected])
    (samples,) = seen
    assert samples.groups.tolist() == [0] * 4 + [1] * 4
    assert samples.layout.num_trajectories == len(samples.scores) == 8
    assert samples.layout.num_steps == len(samples.rewards)
    assert samples.scores.tolist() == pytest.approx([sum(row) for row in scripted_rewards(8)])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda samples: [0.0], "advantage_func: got list, expected a tensor of shape"),
        (lambda samples: samples.scores, r"advantage_func: got shape \(8,\), expected"),
        (lambda samples: samples.rewards / 0, "advantage_func: got numbers that are not finite"),
    ],
)
def test_wrong_advantages_of_ones_own_raise(returned, message, tmp_path):
    trainer = letter_game.trainer(tmp_path, advantage_func=returned)
    with pytest.raises((ValueError, TypeError), match=message):
        batch_of(trainer)


# Environments in TRL's own loop.


class Fails(letter_game.LetterGame):
    """Its second answer fails before there is a reward."""

    def answer(self, word: str) -> str:
        """Answers.

        Args:
            word: the capital.

        Returns:
            The next letter.
        """
        if len(self.step_rewards) == 1 and not self._failed:
            self._failed = True
            raise RuntimeError("no answer")
        self.step_rewards.append(float(10 ** len(self.step_rewards)))
        return "say a"

    def reset(self, seed: int = 0, **_: Any) -> str:
        self._failed = False
        return super().reset(seed)


def calling(times: int) -> Any:
    """Return a `parse_response` that reads so many calls in each message."""

    def parse_response(self: Any, ids: Any, prefix: Any = None, tools: Any = None) -> Any:
        function = {"name": "answer", "arguments": {"word": "A"}}
        calls = [{"type": "function", "function": function}] * times
        return {"role": "assistant", "content": "", "tool_calls": calls}

    return parse_response


@has_environments
@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        # The second message's call fails. No call follows the last message.
        (1, [1.0, 0.0, 10.0, 0.0]),
        # The second call of the first message fails.
        (2, [1.0, 10.0 + 100.0, 1000.0 + 10000.0, 0.0]),
    ],
)
def test_rewards_of_calls_belong_to_the_message_that_made_them(
    calls, expected, tmp_path, monkeypatch
):
    found: list[StepSamples] = []

    def own(samples: StepSamples) -> torch.Tensor:
        found.append(samples)
        return samples.rewards

    monkeypatch.setattr(letter_game.LetterTokenizer, "parse_response", calling(calls))
    trainer = letter_game.trainer(
        tmp_path,
        environment_factory=Fails,
        advantage_func=own,
        max_tool_calling_iterations=3,
        max_completion_length=128,
        generation_kwargs={"max_new_tokens": 3},
    )
    batch_of(trainer)
    assert found[0].rewards.view(8, 4).tolist() == [expected] * 8
