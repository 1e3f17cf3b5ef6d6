"""The host notices what is wrong with a kernel: kernels with a fault each, and the same without."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import cuda_on_host
import pytest

# In order, backwards, and drawn.
SEEDS = ("0", "1", "5")
_RACES = (
    "exchange without a barrier",
    "exchange without a barrier after a launch",
    "count without a barrier",
    "sum of blocks without the first fence",
    "sum of blocks without the second fence",
)
_RIGHT = {"exchange": "63 0", "count": "0 0", "sum of blocks": "0 0", "votes": "48 48"}


@pytest.fixture(scope="module")
def faults() -> Path:
    return cuda_on_host.program("faults", "-O1")


def run(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", _RIGHT)
def test_right_kernels_give_the_same_in_any_order(faults, name, seed):
    done = run(faults, name, seed)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, _RIGHT[name])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("barriers apart", "threads of a block are at the barriers of lines"),
        ("stuck", "no thread can go on; thread 0 of block 0 waits at a barrier"),
        ("outside of the mask", "a lane reads one that is not in the mask"),
        ("not in the mask", "a lane is not in its own mask"),
        (
            "a lane has left",
            "a mask names a lane that is not there or has left|no thread can go on",
        ),
        ("two operations", "lanes of a warp are at different operations"),
        ("too many threads", "1025 threads a block"),
    ],
)
def test_a_fault_ends_the_launch_with_an_exception(faults, name, words, seed):
    done = run(faults, name, seed)
    assert done.returncode == 3, done.stderr
    assert re.match(f"CUDA on the host: ({words})", done.stdout), done.stdout


def test_products_and_sums_are_contracted_where_the_processor_can():
    """At -O2, as the module of all kernels is built."""
    left = 2.0**-60 if cuda_on_host.contraction() else 0.0
    assert (
        run(cuda_on_host.program("faults", "-O2"), "product and sum").stdout.split()
        == [f"{left:g}"] * 2
    )


def test_approximate_powers_are_off_by_two_units(faults):
    """A unit is between 1 and 2 of those of the smallest power below."""
    for off in map(float, run(faults, "power").stdout.split()):
        assert 1 < abs(off) < 2.6


def test_shared_memory_that_was_not_written_is_nan(faults):
    assert "nan" in run(faults, "unwritten").stdout


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [*_RIGHT, *_RACES])
def test_the_thread_sanitizer_sees_races_in_any_order(name, seed):
    done = run(cuda_on_host.program("faults", "-O1", "-fsanitize=thread"), name, seed)
    has_race = "data race" in done.stderr and "faults.cpp" in done.stderr
    assert has_race == (name in _RACES), done.stderr
    assert done.returncode == (66 if has_race else 0)


@pytest.mark.parametrize("name", ["overrun", *_RIGHT, "stuck"])
def test_the_address_sanitizer_sees_the_end_of_shared_memory(name):
    done = run(cuda_on_host.program("faults", "-O1", "-fsanitize=address,undefined"), name)
    assert ("AddressSanitizer" in done.stderr) == (name == "overrun"), done.stderr
