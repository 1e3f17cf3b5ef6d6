"""Barriers and fences are needed, and the absence of one is noticed: by the thread sanitizer, or as
outputs that differ, or as a launch that fails."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import cuda_on_host
import pytest
from cuda_on_host import ORDERS

# "file:line" of every barrier and fence of the kernels.
SITES = [
    f"{path.name}:{number}"
    for path in sorted((cuda_on_host.ROOT / "csrc/cuda").iterdir())
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(r"__(?:syncthreads|syncwarp|threadfence)\w*\(", line)
]


class Call(NamedTuple):
    """What a small call prints: see small_calls/main.cpp."""

    name: str
    digest: str
    sites: frozenset[str]


class Program:
    """The small calls with the thread sanitizer."""

    def __init__(self) -> None:
        self._path = cuda_on_host.whole_program("small_calls", "-O1", "-fsanitize=thread")
        done = self.run(*ORDERS[-1])
        assert done.returncode == 0, done.stdout + done.stderr
        self.stdout = done.stdout
        lines = [line.split() for line in done.stdout.splitlines()]
        self.calls = [Call(name, digest, frozenset(sites)) for name, digest, *sites in lines]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self._path, *words], capture_output=True, text=True, check=False)

    def notices(self, call: Call, site: str, order: tuple[str, str]) -> bool:
        """Return whether a call goes wrong without a barrier or a fence."""
        done = self.run(*order, site, call.name)
        is_same = done.stdout.split()[:2] == [call.name, call.digest]
        return "data race" in done.stderr or not is_same


@pytest.fixture(scope="module")
def program() -> Program:
    return Program()


def test_every_operator_has_a_small_call():
    lists = (cuda_on_host.ROOT / "csrc/include/steppo").glob("*operators.inc")
    operators = {
        name
        for path in lists
        if path.name != "cpu_operators.inc"
        for name in re.findall(r"^STEPPO_OPERATOR\((\w+)", path.read_text(), re.MULTILINE)
    }
    calls = Path(__file__).with_name("small_calls").glob("*.cpp")
    called = re.findall(r"\bcuda::(\w+)\(", "".join(path.read_text() for path in calls))
    assert operators
    assert operators <= set(called)


@pytest.mark.parametrize("order", ORDERS[:-1], ids="-".join)
def test_kernels_race_in_no_order_and_give_the_same_bits_in_all(program, order):
    done = program.run(*order)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == program.stdout


@pytest.mark.parametrize("site", SITES)
def test_a_barrier_or_a_fence_that_is_missing_is_noticed(program, site):
    calls = [call for call in program.calls if site in call.sites]
    assert calls, f"no small call comes to {site}"
    # A call that comes to few others is a short one.
    calls.sort(key=lambda call: len(call.sites))
    assert any(
        program.notices(call, site, order) for order in reversed(ORDERS) for call in calls
    ), f"{site} is not needed, or no small call needs it"
