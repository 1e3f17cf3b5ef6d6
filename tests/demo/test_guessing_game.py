"""The game of the examples, and the loop of one's own on it by accelerate, with a tiny model."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="the demo's extra is not installed")

import chatml

if not chatml.EXAMPLES.is_dir():
    pytest.skip("no examples/: the package is installed without it", allow_module_level=True)
_path = chatml.EXAMPLES / "guessing_game.py"
_spec = importlib.util.spec_from_file_location("guessing_game", _path)
guessing_game = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(guessing_game)


def test_rewards_of_guesses():
    game = guessing_game.Guessing(seed=0)
    number = game._number
    other = number % guessing_game.LARGEST + 1
    assert game.answer("none at all") == "That is no number from 1 to 9."
    assert (
        game.answer(f"I say {other}!")
        == f"My number is {'larger' if other < number else 'smaller'}."
    )
    assert not game.is_over
    game.answer(str(number))
    assert game.is_over
    assert game.step_rewards == [0.0, 1 - abs(other - number) / guessing_game.LARGEST, 1.0]


def test_runs_of_the_mask_are_guesses():
    tokenizer = chatml.tokenizer()
    row = guessing_game.Row(tokenizer, seed=0)
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


@pytest.mark.parametrize("ranks", [1, 2])
def test_loop_by_accelerate(ranks: int, tmp_path: Path):
    chatml.save(tmp_path)
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--mixed_precision", "no"]
    launch += ["--num_machines", "1", "--dynamo_backend", "no", "--num_processes", str(ranks)]
    example = [str(chatml.EXAMPLES / "train_with_accelerate.py"), "--model", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *launch, *example, "--updates", "2", "--groups", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    updates = re.findall(
        r"^update (\d): (\d+) steps, .* ratios of (\S+) to", done.stdout, re.MULTILINE
    )
    assert [number for number, *_ in updates] == ["1", "2"]
    for _, steps, least in updates:
        # Four games a rank, of one to three guesses each. The second pass has ratios of its own.
        assert 4 * ranks <= int(steps) <= 12 * ranks
        assert least != "1.00000"
