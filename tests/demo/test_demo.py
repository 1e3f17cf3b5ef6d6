# ruff: noqa: E402 - the skip must come before the imports that it guards
from __future__ import annotations

import builtins
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("gymnasium", "jinja2", "matplotlib", "tokenizers", "transformers"):
    pytest.importorskip(package, reason="the demo's extra is not installed")

from rich.console import Console

from steppo_kernels import StepLayout
from steppo_kernels.demo import run as run_module
from steppo_kernels.demo import run_demo
from steppo_kernels.demo.agent import Agent
from steppo_kernels.demo.environment import (
    ACTION_OPENINGS,
    DIRECTIONS,
    GOAL_TEXT,
    HOLE_TEXT,
    MISUNDERSTOOD,
    TIME_TEXT,
    TextFrozenLake,
    parse_action,
)
from steppo_kernels.demo.rollout import Rollouts, collect
from steppo_kernels.demo.text import ChatText, build_tokenizer
from steppo_kernels.demo.train import LEVELS, TrainConfig, Trainer
from steppo_kernels.demo.warmup import encode_conversations, random_conversation, warm_up


@pytest.fixture(scope="module")
def text() -> ChatText:
    return ChatText(build_tokenizer())


@pytest.fixture(scope="module")
def agent(text: ChatText) -> Agent:
    """An agent that knows the action format."""
    torch.manual_seed(0)
    made = Agent(text.vocab_size, hidden_size=32, heads=2, pad_id=text.pad_id)
    warm_up(made, text, TextFrozenLake(), steps=80, seed=0)
    return made


def play(agent: Agent, text: ChatText, count: int = 12, *, sampled: bool = True) -> Rollouts:
    generator = torch.Generator().manual_seed(0) if sampled else None
    envs = [TextFrozenLake() for _ in range(count)]
    return collect(agent, text, envs, seeds=list(range(count)), generator=generator)


@pytest.fixture(scope="module")
def rollouts(agent: Agent, text: ChatText) -> Rollouts:
    return play(agent, text)


# The environment


def start_at(cell: tuple[int, int], **options: int) -> TextFrozenLake:
    env = TextFrozenLake(**options)
    env.reset(seed=0, options={"start": cell})
    return env


def test_goal_pays_and_ends() -> None:
    observation, reward, terminated, truncated, info = start_at((3, 2)).step("I go east.")
    assert (observation, reward, terminated, truncated) == (GOAL_TEXT, 1.0, True, False)
    assert info == {"outcome": "goal", "malformed": False}


def test_hole_ends_without_reward() -> None:
    observation, reward, terminated, _, info = start_at((3, 1)).step("Go west.")
    assert (observation, reward, terminated) == (HOLE_TEXT, 0.0, True)
    assert info["outcome"] == "hole"


def test_reward_comes_only_at_the_end() -> None:
    env = start_at((0, 0))
    way = ["south", "south", "east", "south", "east", "east"]
    results = [env.step(f"My next move is {direction}.") for direction in way]
    assert [result[1] for result in results] == [0, 0, 0, 0, 0, 1]
    assert [result[2] for result in results] == [False] * 5 + [True]
    assert env.path[-1] == env.goal


@pytest.mark.parametrize("said", ["", "east", "Go east", "Go up.", "Go east. Go east.", "go east."])
def test_malformed_action_uses_up_the_turn(said: str) -> None:
    env = start_at((3, 2), max_turns=2)
    observation, reward, terminated, truncated, info = env.step(said)
    assert observation.startswith(MISUNDERSTOOD)
    assert (reward, terminated, truncated, info["malformed"]) == (0.0, False, False, True)
    assert env.path == [(3, 2), (3, 2)]
    observation, _, terminated, truncated, info = env.step(said)
    assert (observation, terminated, truncated) == (TIME_TEXT, False, True)
    assert info["outcome"] == "time"


def test_shore_holds() -> None:
    env = start_at((0, 0))
    assert env.step("Go north.")[2:4] == (False, False)
    assert env.path == [(0, 0), (0, 0)]


def test_observation_tells_the_goal_and_the_holes() -> None:
    env = TextFrozenLake()
    assert env.reset(options={"start": (1, 2)})[0] == "Goal southeast. West hole, east hole."
    assert env.reset(options={"start": (3, 2)})[0] == "Goal east. Ice all around."


def test_starts_are_random_cells_of_ice() -> None:
    env = TextFrozenLake()
    starts = set()
    for seed in range(200):
        env.reset(seed=seed)
        starts.add(env.path[0])
    assert len(starts) == 11
    with pytest.raises(ValueError, match="start"):
        env.reset(options={"start": (1, 1)})


@pytest.mark.parametrize("opening", ACTION_OPENINGS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_sentence_is_understood_and_several_tokens(
    text: ChatText, opening: str, direction: str
) -> None:
    sentence = f"{opening} {direction}."
    assert parse_action(sentence) == direction
    ids = text.tokenizer.encode(sentence, add_special_tokens=False)
    assert len(ids) >= 3
    assert text.sentence([*ids, text.end_id]) == sentence


# The tokenizer and the template


def test_markers_find_the_assistant_spans_of_the_template(text: ChatText) -> None:
    rng = np.random.default_rng(0)
    conversations = [random_conversation(TextFrozenLake(), rng) for _ in range(8)]
    token_ids, _, action_mask = encode_conversations(text, conversations)
    layout = StepLayout.from_markers(token_ids, text.action_marker, text.end_id)
    assert torch.equal(layout.step_ids >= 0, action_mask)
    turns = sum(message["role"] == "assistant" for c in conversations for message in c)
    assert layout.num_steps == turns


def test_markers_find_the_sampled_actions(rollouts: Rollouts, text: ChatText) -> None:
    layout = StepLayout.from_markers(rollouts.token_ids, text.action_marker, text.end_id)
    assert torch.equal(layout.step_ids >= 0, rollouts.action_mask)
    assert layout.num_steps == sum(rollouts.turns)


def test_prompts_are_what_the_template_renders(text: ChatText) -> None:
    conversation = random_conversation(TextFrozenLake(), np.random.default_rng(1))
    observations = [m["content"] for m in conversation if m["role"] == "user"]
    actions = [m["content"] for m in conversation if m["role"] == "assistant"]
    ids = text.opening(observations[0])
    for place, action in enumerate(actions):
        ids += [*text.tokenizer.encode(action, add_special_tokens=False), text.end_id]
        if place + 1 < len(actions):
            ids += text.turn(observations[place + 1])
    rendered, _, _ = encode_conversations(text, [conversation])
    # The template also closes the last turn with a line break.
    assert rendered[0, :-1].tolist() == ids


# The agent and the rollouts


def test_states_have_seen_only_the_tokens_before(agent: Agent, rollouts: Rollouts) -> None:
    token_ids, mask = rollouts.token_ids[:1, :40], rollouts.attention_mask[:1, :40]
    changed = token_ids.clone()
    changed[0, 20] += 1
    states, other = agent.states(token_ids, mask), agent.states(changed, mask)
    assert torch.equal(states[0, :21], other[0, :21])
    assert not torch.equal(states[0, 21], other[0, 21])
    assert agent.values(states).shape == token_ids.shape


def test_log_probs_are_those_the_tokens_were_sampled_with(agent: Agent, rollouts: Rollouts) -> None:
    states = agent.states(rollouts.token_ids, rollouts.attention_mask)
    log_probs = agent.log_probs(states, rollouts.token_ids, rollouts.action_mask)
    torch.testing.assert_close(log_probs, rollouts.log_probs, atol=2e-5, rtol=1e-4)


def test_padding_side_changes_nothing(agent: Agent, rollouts: Rollouts) -> None:
    row = int(rollouts.attention_mask.sum(1).argmin())
    length, width = int(rollouts.attention_mask[row].sum()), rollouts.token_ids.shape[1]
    assert length < width
    ids, mask = rollouts.token_ids[row : row + 1], rollouts.attention_mask[row : row + 1]
    right = agent.states(ids, mask)[:, 1:length]
    left = agent.states(ids.roll(width - length, 1), mask.roll(width - length, 1))
    assert torch.isfinite(left).all()
    torch.testing.assert_close(left[:, width - length + 1 :], right, atol=1e-5, rtol=1e-4)


def test_batched_rollouts_equal_single_ones(agent: Agent, text: ChatText) -> None:
    batch = play(agent, text, sampled=False)
    for row in range(len(batch.turns)):
        alone = collect(agent, text, [TextFrozenLake()], seeds=[row])
        length = alone.num_tokens
        assert batch.token_ids[row, :length].tolist() == alone.token_ids[0].tolist()
        assert int(batch.attention_mask[row].sum()) == length
        assert batch.outcomes[row] == alone.outcomes[0]


def test_rewards_lie_on_the_last_token_of_a_won_episode(
    rollouts: Rollouts, agent: Agent, text: ChatText
) -> None:
    rollouts = play(agent, text, 64)
    won = torch.tensor([outcome == "goal" for outcome in rollouts.outcomes])
    assert won.any()
    last = rollouts.attention_mask.sum(1) - 1
    expected = torch.zeros_like(rollouts.rewards)
    expected[won, last[won]] = 1.0
    assert torch.equal(rollouts.rewards, expected)


def test_untrained_rows_run_into_the_token_limit(text: ChatText) -> None:
    torch.manual_seed(0)
    raw = Agent(text.vocab_size, hidden_size=32, heads=2, pad_id=text.pad_id)
    envs = [TextFrozenLake(max_turns=2) for _ in range(4)]
    generator = torch.Generator().manual_seed(0)
    rollouts = collect(
        raw, text, envs, seeds=[0, 1, 2, 3], generator=generator, max_action_tokens=5
    )
    assert set(rollouts.outcomes) == {"time"}
    assert rollouts.malformed == 8
    lengths = StepLayout.from_mask(rollouts.action_mask).step_lengths
    assert int(lengths.max()) == 5


# Training


@pytest.mark.parametrize("method", LEVELS)
def test_a_round_trains_at_every_level(agent: Agent, text: ChatText, method: str) -> None:
    torch.manual_seed(0)
    learner = Agent(text.vocab_size, hidden_size=32, heads=2, pad_id=text.pad_id)
    learner.load_state_dict(agent.state_dict())
    config = TrainConfig(iterations=1, episodes=32, epochs=1, minibatches=2)
    report = Trainer(learner, text, method=method, config=config).train_iteration()
    # Without a win there would be nothing to learn from.
    assert report.success > 0
    assert all(np.isfinite(value) for value in report.metrics.values())
    moved = [
        not torch.equal(a, b) for a, b in zip(learner.parameters(), agent.parameters(), strict=True)
    ]
    assert any(moved)


def test_unknown_method_raises(agent: Agent, text: ChatText) -> None:
    with pytest.raises(ValueError, match="method: got 'REINFORCE'"):
        Trainer(agent, text, method="REINFORCE")


def test_a_folder_that_cannot_be_made_loses_no_training(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run_module, "warm_up", lambda *_, **__: pytest.fail("it trains"))
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        run_demo(out_dir=tmp_path / "file" / "folder", console=Console(quiet=True))


def test_same_seed_gives_the_same_numbers_and_files(tmp_path: Path) -> None:
    config = TrainConfig(iterations=2, episodes=4, epochs=1, minibatches=2)
    threads = torch.get_num_threads()
    state = torch.get_rng_state()

    def once(name: str) -> object:
        return run_demo(
            out_dir=tmp_path / name,
            compare=True,
            seeds=1,
            config=config,
            warmup_steps=20,
            eval_episodes=4,
            console=Console(quiet=True),
        )

    first, second = once("first"), once("second")
    assert first.runs == second.runs
    assert [run.method for run in first.runs] == list(LEVELS)
    names = {"learning_curve.png", "trajectory.png", "comparison.png", "comparison.md"}
    assert {file.name for file in first.files} == names
    for file in first.files:
        head = file.read_bytes()[:4]
        assert head == (b"\x89PNG" if file.suffix == ".png" else b"# St")
    # The caller's settings are left as they were.
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_gymnasium(name: str, *args: object, **options: object) -> object:
        if name.partition(".")[0] == "gymnasium":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *args, **options)

    for name in [name for name in sys.modules if name.startswith("steppo_kernels.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_gymnasium)
    with pytest.raises(ModuleNotFoundError, match=r"gymnasium.*pip install '\.\[demo\]'"):
        importlib.import_module("steppo_kernels.demo")
