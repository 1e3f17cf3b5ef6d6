"""Runs the example of a docstring."""

from __future__ import annotations

import doctest
import inspect
import re
from typing import Any

import pytest
import torch

_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_SECTION = re.compile(r"^Example:\n+ +>>> ", re.MULTILINE)


def run_example(name: str, owner: Any, public: dict[str, Any]) -> None:
    """Fail unless a docstring ends with an example that prints what it says.

    Examples see torch and the public names, and import everything else.
    """
    text = inspect.getdoc(owner) or ""
    if not _SECTION.search(text):
        pytest.fail(f"{name}: no section `Example:` with >>> lines", pytrace=False)
    example = doctest.DocTestParser().get_doctest(
        text, {"torch": torch, **public}, name, None, None
    )
    output: list[str] = []
    with torch.random.fork_rng(devices=[]):
        result = doctest.DocTestRunner(optionflags=_OPTIONS).run(example, out=output.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(output)
