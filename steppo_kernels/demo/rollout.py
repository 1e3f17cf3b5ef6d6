"""Batched rollouts: the agent plays many episodes side by side, one conversation a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from .agent import Agent
from .environment import TextFrozenLake
from .text import ChatText


@dataclass(frozen=True)
class Rollouts:
    """A batch of finished conversations, padded on the right.

    The ids are the ones that were sampled; nothing is tokenized a second time.

    Attributes:
        token_ids: int64 [B, T].
        attention_mask: int64 [B, T], 1 at real tokens.
        action_mask: bool [B, T], True at tokens the agent produced.
        rewards: float32 [B, T], each turn's reward at the last token of its action.
        log_probs: float32 [B, T], log-probability each action token was sampled with; 0 elsewhere.
        outcomes: [B] ``"goal"``, ``"hole"`` or ``"time"``.
        turns: [B] number of turns.
        malformed: number of actions the environment did not understand.
    """

    token_ids: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    rewards: Tensor
    log_probs: Tensor
    outcomes: list[str]
    turns: list[int]
    malformed: int

    @property
    def success(self) -> float:
        """Share of the episodes that reached the goal."""
        return self.outcomes.count("goal") / len(self.outcomes)

    @property
    def num_tokens(self) -> int:
        """Number of real tokens, prompts included."""
        return int(self.attention_mask.sum())


class _Conversation:
    """One growing row."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.is_action: list[bool] = []
        self.rewards: list[float] = []
        self.log_probs: list[float] = []

    def say(self, ids: Sequence[int], log_probs: Sequence[float] | None = None) -> None:
        self.ids.extend(ids)
        self.is_action.extend([log_probs is not None] * len(ids))
        self.rewards.extend([0.0] * len(ids))
        self.log_probs.extend(log_probs if log_probs is not None else [0.0] * len(ids))


class _Decoder:
    """Generation for several rows at once over one key-value cache.

    Rows share the cache's columns: where a row has nothing to say its column is masked out, and its
    positions count its own tokens only. Prompts are padded on the right, so that every query has a
    real token to attend to.
    """

    def __init__(
        self,
        agent: Agent,
        text: ChatText,
        generator: torch.Generator | None,
        max_action_tokens: int,
    ) -> None:
        self.agent = agent
        self.text = text
        self.generator = generator
        self.max_action_tokens = max_action_tokens
        self.cache = DynamicCache()
        self.mask: Tensor | None = None
        self.lengths: Tensor | None = None

    def keep(self, rows: list[int]) -> None:
        """Drop every row but `rows`."""
        assert self.mask is not None
        assert self.lengths is not None
        index = torch.tensor(rows)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]
        self.lengths = self.lengths[index]

    def _append(self, token_ids: Tensor, real: Tensor) -> Tensor:
        """Feed tokens [A, Q], padding where `real` [A, Q] is False; return next logits [A, V]."""
        if self.mask is None or self.lengths is None:
            self.mask = real[:, :0].long()
            self.lengths = torch.zeros(len(real), dtype=torch.long)
        counts = real.long().cumsum(-1)
        positions = self.lengths[:, None] + (counts - 1).clamp(min=0)
        self.mask = torch.cat([self.mask, real.long()], dim=1)
        self.lengths = self.lengths + counts[:, -1]
        last = (counts[:, -1] - 1).clamp(min=0)
        return self.agent.next_logits(token_ids, self.mask, positions, last, self.cache)

    def act(self, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        """Append a prompt to each row and generate an action: its ids and their log-probabilities.

        The last token of an action stays outside the cache: it must open the next prompt.
        """
        token_ids = pad_sequence(
            [torch.tensor(p) for p in prompts], batch_first=True, padding_value=self.text.pad_id
        )
        sizes = torch.tensor([len(p) for p in prompts])
        logits = self._append(token_ids, torch.arange(token_ids.shape[1]) < sizes[:, None])
        actions: list[list[int]] = [[] for _ in prompts]
        log_probs: list[list[float]] = [[] for _ in prompts]
        going = torch.ones(len(prompts), dtype=torch.bool)
        while True:
            distribution = torch.log_softmax(logits, dim=-1)
            if self.generator is None:
                chosen = distribution.argmax(-1, keepdim=True)
            else:
                chosen = torch.multinomial(distribution.exp(), 1, generator=self.generator)
            chosen_log_probs = distribution.gather(-1, chosen).squeeze(-1).tolist()
            ids = chosen.squeeze(-1).tolist()
            for row in going.nonzero().squeeze(-1).tolist():
                actions[row].append(ids[row])
                log_probs[row].append(chosen_log_probs[row])
                going[row] = ids[row] != self.text.end_id and (
                    len(actions[row]) < self.max_action_tokens
                )
            if not going.any():
                return actions, log_probs
            token_ids = chosen.masked_fill(~going[:, None], self.text.pad_id)
            logits = self._append(token_ids, going[:, None])


@torch.no_grad()
def collect(
    agent: Agent,
    text: ChatText,
    envs: Sequence[TextFrozenLake],
    *,
    seeds: Sequence[int],
    generator: torch.Generator | None = None,
    max_action_tokens: int = 12,
) -> Rollouts:
    """Play one episode in every environment.

    Args:
        agent: the model.
        text: tokenizer and template.
        envs: one environment a row.
        seeds: one reset seed a row.
        generator: source of the sampled tokens; None takes the likeliest token instead.
        max_action_tokens: an action that has not ended by then is cut off and malformed.

    Returns:
        The finished conversations, in the order of `envs`.
    """
    if len(seeds) != len(envs):
        raise ValueError(f"seeds: got {len(seeds)}, expected one for each of {len(envs)} envs")
    decoder = _Decoder(agent, text, generator, max_action_tokens)
    rows = [_Conversation() for _ in envs]
    outcomes = [""] * len(envs)
    turns = [0] * len(envs)
    malformed = 0
    active = list(range(len(envs)))
    prompts = []
    for row, env, seed in zip(rows, envs, seeds, strict=True):
        observation, _ = env.reset(seed=seed)
        prompts.append(text.opening(observation))
        row.say(prompts[-1])
    while active:
        actions, log_probs = decoder.act(prompts)
        prompts, still = [], []
        for place, index in enumerate(active):
            row, action = rows[index], actions[place]
            closed = action[-1] == text.end_id
            # A cut-off sentence is no sentence, even where its beginning happens to parse.
            spoken = text.sentence(action) if closed else ""
            observation, reward, terminated, truncated, info = envs[index].step(spoken)
            row.say(action, log_probs[place])
            row.rewards[-1] = reward
            turns[index] += 1
            malformed += info["malformed"]
            if terminated or truncated:
                outcomes[index] = info["outcome"]
                continue
            prompt = text.turn(observation, closed=closed)
            row.say(prompt)
            prompts.append(action[-1:] + prompt)
            still.append(place)
        if still and len(still) < len(active):
            decoder.keep(still)
        active = [active[place] for place in still]

    def stack(name: str, dtype: torch.dtype, fill: float) -> Tensor:
        columns = [torch.tensor(getattr(row, name), dtype=dtype) for row in rows]
        return pad_sequence(columns, batch_first=True, padding_value=fill)

    token_ids = stack("ids", torch.long, text.pad_id)
    lengths = torch.tensor([len(row.ids) for row in rows])
    return Rollouts(
        token_ids=token_ids,
        attention_mask=(torch.arange(token_ids.shape[1]) < lengths[:, None]).long(),
        action_mask=stack("is_action", torch.bool, False),
        rewards=stack("rewards", torch.float32, 0.0),
        log_probs=stack("log_probs", torch.float32, 0.0),
        outcomes=outcomes,
        turns=turns,
        malformed=malformed,
    )
