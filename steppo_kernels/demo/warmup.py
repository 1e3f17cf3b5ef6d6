"""Supervised warm-up: teaches how an action is written, and nothing about which action is good."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .agent import Agent
from .environment import SYSTEM_PROMPT, TextFrozenLake, random_action
from .text import ChatText


def random_conversation(env: TextFrozenLake, rng: np.random.Generator) -> list[dict[str, str]]:
    """Return the messages of one episode played with uniformly random, well-formed actions."""
    observation, _ = env.reset(seed=int(rng.integers(2**31)))
    messages = [{"role": "system", "content": SYSTEM_PROMPT}]
    done = False
    while not done:
        action = random_action(rng)
        messages.append({"role": "user", "content": observation})
        messages.append({"role": "assistant", "content": action})
        observation, _, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
    return messages


def encode_conversations(
    text: ChatText, conversations: Sequence[list[dict[str, str]]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode conversations with the chat template.

    Returns:
        Token ids, attention mask and action mask, each [B, T], padded on the right. The action mask
        marks the assistant's sentences with their ``<|im_end|>``.
    """
    encoded = [
        text.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        for messages in conversations
    ]
    ids = [torch.tensor(e["input_ids"]) for e in encoded]
    token_ids = pad_sequence(ids, batch_first=True, padding_value=text.pad_id)
    attention_mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    actions = [torch.tensor(e["assistant_masks"], dtype=torch.bool) for e in encoded]
    return token_ids, attention_mask, pad_sequence(actions, batch_first=True)


def warm_up(
    agent: Agent,
    text: ChatText,
    env: TextFrozenLake,
    *,
    steps: int,
    batch_size: int = 8,
    learning_rate: float = 1e-2,
    seed: int = 0,
    on_step: Callable[[float], None] | None = None,
) -> float:
    """Train the agent to imitate uniformly random actions.

    Args:
        agent: trained in place.
        text: tokenizer and template.
        env: environment the random actions are played in.
        steps: optimizer steps, each on fresh conversations.
        batch_size: conversations a step.
        learning_rate: peak learning rate, decayed linearly to zero.
        seed: seed of the conversations.
        on_step: called with the loss after each step.

    Returns:
        The last step's cross-entropy per action token, in nats.
    """
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(agent.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    loss_value = float("nan")
    for _ in range(steps):
        conversations = [random_conversation(env, rng) for _ in range(batch_size)]
        token_ids, attention_mask, action_mask = encode_conversations(text, conversations)
        states = agent.states(token_ids, attention_mask)
        loss = -agent.log_probs(states, token_ids, action_mask).sum() / action_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        loss_value = float(loss.detach())
        if on_step is not None:
            on_step(loss_value)
    return loss_value
