"""The C++ kernels for each instruction set, not only for the one that this machine prefers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from steppo_kernels import backends

_FOLDER = Path(__file__).parent
_FILES = ("golden", "gae", "policy_loss", "value_loss", "broadcast", "segment", "layout", "rules")
# The properties, the error rule, ties and sizes; what does not depend on the kernel is left out.
_TESTS = (
    "test_loops or fp32_error or keeps_its_gradient or golden or segment or from_markers or "
    "threads or test_sizes or masked_position or same_bits"
)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_set(isa):
    if why := backends.unavailable("cpu", torch.device("cpu")):
        pytest.skip(f"cpu: {why}")
    environment = {
        **{name: value for name, value in os.environ.items() if "PYTEST" not in name},
        "STEPPO_ISA": isa,
    }

    def python(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *args], env=environment, capture_output=True, text=True, check=False
        )

    found = python("-c", "import torch; from steppo_kernels import _C_cpu; print(_C_cpu.isa())")
    if found.stdout.strip() != isa:
        pytest.skip(f"this machine has no {isa}: its kernels are {found.stdout.strip()!r}")
    files = [str(_FOLDER / f"test_{name}.py") for name in _FILES]
    options = ("-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider")
    done = python("-m", "pytest", *options, "-k", f"cpu and ({_TESTS})", *files)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
