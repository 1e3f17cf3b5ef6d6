"""Examples of public docstrings and blocks of the page run, and the package says what it needs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import re
from pathlib import Path

import pytest
from docstrings import run_example

from steppo_kernels.integrations import trl

_PAGE = Path(__file__).parents[3] / "docs/trl.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", trl.__all__)
def test_docstring_ends_with_an_example_that_runs(name):
    run_example(name, getattr(trl, name), {key: getattr(trl, key) for key in trl.__all__})


@pytest.mark.parametrize(("code", "prints"), _BLOCK.findall(_PAGE.read_text()))
def test_block_of_the_page_runs_and_prints_what_it_says(code, prints):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(_PAGE), "exec"), {"__name__": "__main__"})
    assert printed.getvalue() == prints


def test_the_page_has_blocks():
    assert len(_BLOCK.findall(_PAGE.read_text())) == 2


def test_another_release_and_no_release_of_trl_raise(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.160.0" if name == "trl" else version(name)
    )
    with pytest.raises(ImportError, match=r"trl: got version 1.160.0, expected 1.16, whose hooks"):
        importlib.reload(trl)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[trl\]'"):
        importlib.reload(trl)
    monkeypatch.undo()
    importlib.reload(trl)
