"""The programs of `make sanitize` fit the kernels: the tests run no sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_COMPILER = shutil.which(os.environ.get("CXX", "c++"))
_PROGRAMS = sorted((_ROOT / "tests/native").glob("*.cpp"))


@pytest.mark.skipif(_COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("program", _PROGRAMS, ids=lambda path: path.name)
def test_compiles(program):
    words = [_COMPILER, "-std=c++17", "-fsyntax-only", "-Wno-psabi", "-DSTEPPO_ISA=baseline"]
    words += ["-I", str(_ROOT / "csrc/include"), "-I", str(_ROOT / "csrc/cpu"), str(program)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
