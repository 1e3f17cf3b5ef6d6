"""The addresses of kernels, which the address sanitizer and that of undefined behaviour watch."""

from __future__ import annotations

import subprocess

import cuda_on_host
import pytest
from cuda_on_host import ORDERS


@pytest.fixture(scope="module")
def printed() -> list[subprocess.CompletedProcess[str]]:
    """What the small calls print in each order: see small_calls/main.cpp."""
    path = cuda_on_host.whole_program(
        "small_calls", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"
    )
    return [
        subprocess.run([path, *order], capture_output=True, text=True, check=False)
        for order in ORDERS
    ]


def test_kernels_stay_in_their_memory(printed):
    for done in printed:
        assert done.returncode == 0, done.stdout + done.stderr
        assert not done.stderr


def test_bits_are_the_same_in_all_orders(printed):
    assert printed[0].stdout
    assert {done.stdout for done in printed} == {printed[0].stdout}
