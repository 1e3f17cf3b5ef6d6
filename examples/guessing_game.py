"""A game of several turns, played in ChatML by a policy: what the examples of trainers train on.

The policy has three guesses at a number from 1 to 9, and is told after each whether the number is
larger or smaller. Each guess is a step with a reward of its own: 1 for the number, less for a
number that is further away, 0 for anything else. A guess that is right ends the game.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import torch

TURNS, LARGEST = 3, 9
TOKENS_OF_A_GUESS = 8
RULES = f"Guess my number from 1 to {LARGEST}. Answer with one number and nothing else."


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
    """One game as a trainer wants it.

    Attributes:
        prompt: the tokens before the first guess.
        completion: the tokens of all turns after that.
        mask: of the completion, 1 where the policy wrote.
    """

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


@torch.no_grad()
def play(
    policy: Any,
    tokenizer: Any,
    seeds: Sequence[int],
    *,
    temperature: float = 1.0,
    is_synced: bool = False,
) -> list[Row]:
    """Play games side by side, one of each seed.

    Args:
        policy: generates, on its own device.
        tokenizer: that of the policy.
        seeds: those of the numbers.
        temperature: of the sampling.
        is_synced: whether ranks that share the weights call the policy equally often, as FSDP
            needs it. Games that are over are then played on for nothing.
    """
    rows = [Row(tokenizer, seed) for seed in seeds]
    for _ in range(TURNS):
        going = [row for row in rows if is_synced or not row.game.is_over]
        if not going:
            break
        inputs = tokenizer.pad(
            {"input_ids": [row.prompt + row.completion for row in going]},
            padding_side="left",
            return_tensors="pt",
        ).to(policy.device)
        made = policy.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            temperature=temperature,
            max_new_tokens=TOKENS_OF_A_GUESS,
            pad_token_id=tokenizer.pad_token_id,
            synced_gpus=is_synced,
        )
        for row, ids in zip(going, made[:, inputs["input_ids"].shape[1] :], strict=True):
            if not row.game.is_over:
                row.add(ids.tolist())
    return rows
