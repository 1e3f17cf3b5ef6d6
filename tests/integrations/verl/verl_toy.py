"""A game of several turns, and a tokenizer, an actor and a critic that are small enough for it."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForTokenClassification,
)

LETTERS = "abcd"
_SPECIAL = ("<pad>", "<unk>", "<|turn|>", "<|end|>")
_WORDS = ("user", "assistant", "say", "go", *LETTERS, *LETTERS.upper())
_TEMPLATE = (
    "{%- for m in messages -%}<|turn|>{{ m['role'] }} {{ m['content'] }}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|turn|>assistant {%- endif -%}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate((*_SPECIAL, *_WORDS))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(word, special=True) for word in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        padding_side="left",
        chat_template=_TEMPLATE,
    )


def write_models(folder: Path) -> tuple[Path, Path]:
    """Write an actor and a critic with random weights; returns their folders."""
    words = tokenizer()
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    actor, critic = folder / "actor", folder / "critic"
    Qwen2ForCausalLM(config).save_pretrained(actor)
    config.num_labels = 1
    Qwen2ForTokenClassification(config).save_pretrained(critic)
    for path in (actor, critic):
        words.save_pretrained(path)
    return actor, critic


class Capitals:
    """The environment says a letter, and its capital is the right answer: 1, another one 0.1."""

    turns = 3

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._letter = self._random.choice(LETTERS)

    def says(self) -> str:
        return f"say {self._letter}"

    def answer(self, text: str) -> float:
        """Take an answer, return its reward and go on to the next letter."""
        word, wanted = (*text.split(), "")[0], self._letter.upper()
        self._letter = self._random.choice(LETTERS)
        if word == wanted:
            return 1.0
        return 0.1 if word and word in LETTERS.upper() else 0.0
