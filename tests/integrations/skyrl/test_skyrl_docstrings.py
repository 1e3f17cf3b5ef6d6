"""The docstring of every public name ends with an example, and the example runs."""

from __future__ import annotations

import doctest
import inspect

import pytest

from steppo_kernels.integrations import skyrl


@pytest.mark.parametrize("public", skyrl.__all__)
def test_docstring_ends_with_an_example_that_runs(public):
    text = inspect.getdoc(getattr(skyrl, public)) or ""
    assert "\nExample:\n    >>> " in text
    example = doctest.DocTestParser().get_doctest(text, {}, public, None, None)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    output: list[str] = []
    result = doctest.DocTestRunner(optionflags=options).run(example, out=output.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(output)
