"""A tiny model of ChatML, in the place of the one that examples train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"
_SPECIAL = ["<|im_end|>", "<|im_start|>"]


def tokenizer() -> Any:
    """Return one whose tokens are bytes. Padding ends turns, as in SmolLM2."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(_SPECIAL + letters)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=_SPECIAL[0], eos_token=_SPECIAL[0], padding_side="left"
    )


def save(folder: Path) -> None:
    """Write the tokenizer and a model of one layer to a folder."""
    words = tokenizer()
    words.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
