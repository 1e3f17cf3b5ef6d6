"""The house rules that can be counted: formatting, the length of files, where tests stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import steppo_kernels

_ROOT = Path(__file__).parents[2]
_PACKAGE = Path(steppo_kernels.__file__).parent
_FOLDERS = (
    "building",
    "steppo_kernels",
    "csrc",
    "python",
    "tests",
    "tools",
    "benchmarks",
    "examples",
)
_SUFFIXES = {".py", ".pyi", ".cpp", ".cu", ".h", ".cuh", ".inc"}
_LINES = 500
_UNFORMATTED = 40
# Folders of tests that ask something of every wing, and that of the modules below the wings.
_ACROSS = {"cuda", "docs", "fuzz", "ground", "native", "packaging", "peers", "rules"}


def sources() -> Iterator[Path]:
    if not (_ROOT / "csrc").is_dir():
        pytest.skip("no csrc/: the package is installed without its sources")
    yield from _ROOT.glob("*.py")
    for folder in _FOLDERS:
        found = [path for path in (_ROOT / folder).rglob("*") if path.suffix in _SUFFIXES]
        assert found, f"no sources in {folder}/"
        yield from found


def test_no_source_file_is_long():
    lengths = {path: path.read_text().count("\n") for path in sources()}
    long = {str(path.relative_to(_ROOT)): n for path, n in lengths.items() if n > _LINES}
    assert long == {}, f"expected at most {_LINES} lines"


def test_the_formatter_is_overruled_as_an_exception():
    mark = re.compile(r"#\s*fmt:\s*(?:skip|off)")
    counts = {
        str(path.relative_to(_ROOT)): len(mark.findall(path.read_text()))
        for path in sources()
        if path.suffix == ".py"
    }
    assert sum(counts.values()) <= _UNFORMATTED, {k: n for k, n in counts.items() if n}


def test_folders_of_tests_mirror_the_wings():
    tests = _ROOT / "tests"
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    wings = {
        path.parent.relative_to(_PACKAGE)
        for path in _PACKAGE.rglob("*.py")
        if path.parent != _PACKAGE
    }
    across = {Path(name) for name in _ACROSS}
    homeless = folders - wings - across - {Path()}
    assert homeless == set(), f"expected {sorted(map(str, wings | across))}"


def test_names_of_test_files_say_which_they_are():
    """pytest prints the name alone, and imports files of one name as one module."""
    names = [path.name for path in (_ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
