"""The docstring of every public name ends with an example, and the example runs."""

from __future__ import annotations

import pytest
from docstrings import run_example

from steppo_kernels.integrations import verl


@pytest.mark.parametrize("public", verl.__all__)
def test_docstring_ends_with_an_example_that_runs(public):
    run_example(public, getattr(verl, public), {})
