"""The ranks that the tests of this folder run on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from worlds import Worlds, is_possible

# The folder benchmarks/ is not installed. Whatever is installed comes first.
sys.path.append(str(Path(__file__).parents[2]))


@pytest.fixture(autouse=True)
def _is_of_a_cpu(request: pytest.FixtureRequest) -> None:
    """Ranks have tensors of the CPU, which gloo joins: kernels of a GPU cannot take them."""
    for name in {"target", "kernel", "gpu_kernel"}.intersection(request.fixturenames):
        if request.getfixturevalue(name).device != "cpu":
            pytest.skip("ranks have tensors of the CPU")


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """Groups of 2 and 3 processes."""
    if not is_possible():
        pytest.skip("this torch has no gloo")
    made = Worlds()
    yield made
    made.end()
