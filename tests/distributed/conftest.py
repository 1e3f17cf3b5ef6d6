"""The ranks that the tests of this folder run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from worlds import Worlds, is_possible


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """Groups of 2 and 3 processes."""
    if not is_possible():
        pytest.skip("this torch has no gloo")
    made = Worlds()
    yield made
    made.end()
