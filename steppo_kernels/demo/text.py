"""The demo's tokenizer: a byte-level BPE of the task's own sentences, with a ChatML template."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .environment import (
    DIRECTIONS,
    GOAL_TEXT,
    HOLE,
    HOLE_TEXT,
    MISUNDERSTOOD,
    SYSTEM_PROMPT,
    TIME_TEXT,
    TextFrozenLake,
    random_action,
)

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"

# Words are split at spaces, but a direction stays together with the hole that lies there ("east
# hole"), as in superword tokenizers: otherwise a two-layer model spends most of its training on
# binding neighbouring tokens to each other before it can read the scene.
_PRE_TOKENS = rf" ?(?i:{'|'.join(DIRECTIONS)}) {HOLE}| ?\w+|[^\w\s]|\s"

# `generation` blocks let transformers return the mask of the assistant's tokens.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def corpus(*, episodes: int = 400, seed: int = 0) -> Iterator[str]:
    """Yield the sentences of episodes with uniformly random actions."""
    rng = np.random.default_rng(seed)
    env = TextFrozenLake()
    yield from (GOAL_TEXT, HOLE_TEXT, TIME_TEXT)
    for episode in range(episodes):
        yield from ("system", SYSTEM_PROMPT, MISUNDERSTOOD)
        observation, _ = env.reset(seed=seed + episode)
        done = False
        while not done:
            action = random_action(rng)
            yield from ("user", observation, "assistant", action)
            observation, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated


def build_tokenizer(*, vocab_size: int = 512, seed: int = 0) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer and gives it the ChatML template.

    Args:
        vocab_size: size of the vocabulary; 256 of it are bytes, so that any text can be encoded.
        seed: seed of the training sentences.

    Returns:
        A fast tokenizer with ``<|pad|>``, ``<|im_start|>`` and ``<|im_end|>`` as special tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(seed=seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


class ChatText:
    """Turns observations into prompt tokens and action tokens into sentences.

    Args:
        tokenizer: tokenizer with a ChatML template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.pad_id: int = tokenizer.convert_tokens_to_ids(PAD)
        self.end_id: int = tokenizer.convert_tokens_to_ids(END)
        self.action_marker: list[int] = tokenizer.encode(
            f"{START}assistant\n", add_special_tokens=False
        )
        # Observations repeat, the template engine is slow: render each text once.
        self._render = lru_cache(maxsize=4096)(self._render_uncached)

    def opening(self, observation: str) -> list[int]:
        """Return the tokens of system prompt and first observation, up to the first action."""
        return list(self._render(observation, True))

    def turn(self, observation: str, *, closed: bool = True) -> list[int]:
        """Return the tokens between the end of one action and the start of the next.

        Args:
            observation: what the environment said.
            closed: whether the action before ended in ``<|im_end|>``; if not, it is supplied.
        """
        between = "\n" if closed else f"{END}\n"
        prefix: list[int] = self.tokenizer.encode(between, add_special_tokens=False)
        return prefix + list(self._render(observation, False))

    def sentence(self, action_ids: list[int]) -> str:
        """Return the sentence that an action's tokens spell, without a closing ``<|im_end|>``."""
        spoken = action_ids[:-1] if action_ids and action_ids[-1] == self.end_id else action_ids
        return str(self.tokenizer.decode(spoken, skip_special_tokens=False))

    def _render_uncached(self, observation: str, opening: bool) -> tuple[int, ...]:
        messages = [{"role": "user", "content": observation}]
        if opening:
            messages.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))
