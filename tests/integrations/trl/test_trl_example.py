"""The example, with a tiny model and tokenizer in the place of SmolLM2."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import chatml
import pytest


@pytest.mark.parametrize("critic", [False, True])
def test_command(critic: bool, tmp_path: Path):
    chatml.save(tmp_path)
    options = ["--model", str(tmp_path), "--updates", "2", "--rows", "4", "--threads", "1"]
    done = subprocess.run(
        [
            sys.executable,
            str(chatml.EXAMPLES / "train_with_trl.py"),
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
