"""Barriers and fences are needed, and the absence of one is noticed by the thread sanitizer."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import cuda_on_host
import pytest

_ORDERS = r"__(?:syncthreads|syncthreads_count|threadfence|syncwarp)\("
# The files whose kernels small_calls.cpp runs.
_COVERED = ("broadcast.cu", "last_block.cuh", "policy_loss.cu", "policy_loss_masked.cu")
# "file:line" of every barrier and fence in them.
SITES = [
    f"{path.name}:{number}"
    for path in (cuda_on_host.ROOT / "csrc/cuda" / name for name in _COVERED)
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(_ORDERS, line)
]


@pytest.fixture(scope="module")
def small_calls() -> Path:
    return cuda_on_host.whole_program("small_calls", "-O1", "-fsanitize=thread")


def run(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *words], capture_output=True, text=True, check=False)


def test_kernels_race_in_no_order(small_calls):
    printed = set()
    for seed in ("0", "1", "5"):
        done = run(small_calls, seed)
        assert done.returncode == 0, done.stderr
        printed.add(done.stdout)
    assert len(printed) == 1


@pytest.mark.parametrize("site", SITES)
def test_a_barrier_or_a_fence_that_is_missing_is_noticed(small_calls, site):
    done = run(small_calls, "5", site)
    assert "data race" in done.stderr, f"{site} is not needed, or no small call needs it"
