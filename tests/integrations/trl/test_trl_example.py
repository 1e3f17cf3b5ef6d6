"""The example, with a tiny model and tokenizer in the place of SmolLM2."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

_FOLDER = Path(__file__).parents[3] / "examples"
_SPECIAL = ["<|im_end|>", "<|im_start|>"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    sys.path.insert(0, str(_FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("with_trl", _FOLDER / "train_with_trl.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(_FOLDER))
    return module


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes are tokens. Padding ends turns, as in SmolLM2."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(_SPECIAL + letters)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=_SPECIAL[0], eos_token=_SPECIAL[0], padding_side="left"
    )


def test_rewards_of_guesses(example):
    game = example.Guessing(seed=0)
    number = game._number
    other = number % example.LARGEST + 1
    assert game.answer("none at all") == "That is no number from 1 to 9."
    assert (
        game.answer(f"I say {other}!")
        == f"My number is {'larger' if other < number else 'smaller'}."
    )
    assert not game.is_over
    game.answer(str(number))
    assert game.is_over
    assert game.step_rewards == [0.0, 1 - abs(other - number) / example.LARGEST, 1.0]


def test_runs_of_the_mask_are_guesses(example, tokenizer):
    row = example.Row(tokenizer, seed=0)
    end = tokenizer.eos_token_id
    # The first guess ends by itself, the second is cut off; what follows an end is dropped.
    first = [*tokenizer.encode("99"), end]
    row.add([*first, end, end])
    row.add(tokenizer.encode("88"))
    row.add([*tokenizer.encode("77"), end])
    assert row.game.is_over
    runs = re.findall("1+", "".join(map(str, row.mask)))
    assert list(map(len, runs)) == [3, 2, 3]
    assert len(row.game.step_rewards) == 3
    text = tokenizer.decode(row.completion)
    said = "That is no number from 1 to 9."
    turn = f"<|im_end|>\n<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
    assert text == f"99{turn}88{turn}77<|im_end|>"


@pytest.mark.parametrize("critic", [False, True])
def test_command(critic: bool, tokenizer: Any, tmp_path: Path):
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--updates", "2", "--rows", "4", "--threads", "1"]
    done = subprocess.run(
        [
            sys.executable,
            str(_FOLDER / "train_with_trl.py"),
            *options,
            *["--critic"] * critic,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"│ +(\d) │", done.stdout)[:1] == ["1"]
    assert ("explained" in done.stdout) == critic
    # TRL's own log, and the steps'.
    assert "'reward':" in done.stdout
    assert "'steps/ratio_max':" in done.stdout
