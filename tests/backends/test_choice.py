"""Which backend runs, where what is installed is not what the package asks for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from steppo_kernels.backends.choice import OLDEST_TRITON

_ROOT = Path(__file__).parents[2]
_CALL = """
import torch, steppo_kernels as sk
layout = sk.StepLayout.from_mask(torch.ones(1, 3, dtype=torch.bool))
print(sk.steppo_loss(torch.zeros(1, 3), None, torch.ones(1), layout).loss.item())
try:
    sk.steppo_loss(torch.zeros(1, 3), None, torch.ones(1), layout, backend="triton")
except RuntimeError as error:
    print(error)
"""


def test_a_triton_that_is_too_old_is_no_backend(tmp_path):
    """torch pins the Triton that it was built with: 3.2 of torch 2.6."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("__version__ = '3.2.0'\n")
    done = subprocess.run(
        [sys.executable, "-c", _CALL],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{tmp_path}:{_ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loss, why = done.stdout.splitlines()
    assert float(loss) == -1.0
    oldest = ".".join(map(str, OLDEST_TRITON))
    assert why == (
        "backend: 'triton' cannot run on cpu tensors here: Triton 3.2.0 is installed, and the "
        f"kernels take {oldest} or newer"
    )


def test_the_oldest_triton_is_the_one_that_the_extra_asks_for():
    asked = re.search(r'"triton>=([\d.]+)', (_ROOT / "pyproject.toml").read_text())
    assert asked is not None
    assert tuple(map(int, asked[1].split("."))) == OLDEST_TRITON
