"""How tests install the package from a copy of its sources, without network."""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def builder() -> ModuleType:
    """Return `building.cuda`, which finds nvcc."""
    if not (ROOT / "building").is_dir():
        pytest.skip("no building/: the package is installed without its sources")
    # Not for longer: everything else of the folder is imported as it is installed.
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module("building.cuda")
    finally:
        sys.path.remove(str(ROOT))


def need(*modules: str) -> None:
    """Skip a test where something to build with is not there."""
    for module in modules:
        # Not imported: setuptools would put its distutils in the place of another. Its finder
        # is not asked either: it takes a search for pip for a start of pip. From then on torch's
        # compiler would import the deprecated distutils of Python.
        if importlib.machinery.PathFinder.find_spec(module) is None:
            pytest.skip(f"no {module} to build with")


def outer(**environment: str) -> dict[str, str]:
    """Return the environment variables of this process without those that this package reads."""
    found = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("STEPPO_") and name not in ("PYTHONPATH", "CXX")
    }
    return found | environment


def run(python: Path | str, program: str, **environment: str) -> str:
    """Return what a program prints, run where no package lies beside it."""
    done = subprocess.run(
        [str(python), "-c", program],
        env=outer(**environment),
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def pip(python: Path | str, *words: str, **environment: str) -> None:
    """Run pip, which builds with the packages that are there."""
    options = ("--no-index", "--no-deps", "--no-build-isolation")
    done = subprocess.run(
        [str(python), "-m", "pip", "--isolated", *words, *options],
        env=outer(**environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
