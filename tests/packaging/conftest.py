"""Copies of the sources and environments to install them in."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import installs
import pytest


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the files that git knows or would take: nothing in it has been built."""
    if shutil.which("git") is None or not (installs.ROOT / ".git").exists():
        pytest.skip("no git checkout to install from")
    installs.need("pip", "setuptools", "pybind11", "ninja")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=installs.ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # Folders may have blanks in their names.
    copy = tmp_path / "a source"
    for name in listed.split("\0"):
        if (installs.ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(installs.ROOT / name, copy / name)
    return copy


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The Python of a new environment, which sees the packages of this one."""
    venv.create(tmp_path / "venv", symlinks=True)
    found = tmp_path / "venv" / "bin" / "python"
    packages = installs.run(found, "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # .pth files in the folder that is named here are not read: an editable install stays out.
    (Path(packages) / "outer.pth").write_text(sysconfig.get_path("purelib"))
    return found
