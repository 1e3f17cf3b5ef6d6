"""Installs: without a compiler, where the package does without C++, and the wheel that has it."""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import steppo_kernels

_ROOT = Path(__file__).parents[2]
# One step of two tokens and one of a single token, on-policy: the loss is minus the mean advantage.
_PROGRAM = """
import json, torch
import steppo_kernels as steppo
from steppo_kernels.backends import choice

mask, old = torch.tensor([[0, 1, 1, 0, 1]]), torch.zeros(1, 5)
new = torch.zeros(1, 5, requires_grad=True)
layout = steppo.StepLayout.from_mask(mask, backend="reference")
advantages = torch.tensor([1.0, -0.5])
loss = steppo.steppo_loss(new, old, advantages, layout, backend="reference").loss
loss.backward()
print(json.dumps({
    "file": steppo.__file__, "version": steppo.__version__, "why": choice.why_not_cpu(),
    "auto": choice.resolve("auto", mask.device), "loss": loss.item(), "grad": new.grad.tolist(),
}))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the files that git knows or would take: nothing in it has been built."""
    if shutil.which("git") is None or not (_ROOT / ".git").exists():
        pytest.skip("no git checkout to install from")
    for module in ("pip", "setuptools", "pybind11", "ninja"):
        # Not imported: setuptools would put its distutils in the place of another. Its finder
        # is not asked either: it takes a search for pip for a start of pip. From then on torch's
        # compiler would import the deprecated distutils of Python.
        if importlib.machinery.PathFinder.find_spec(module) is None:
            pytest.skip(f"no {module} to build with")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    copy = tmp_path / "source"
    for name in listed.split("\0"):
        if (_ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_ROOT / name, copy / name)
    return copy


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The Python of a new environment, which sees the packages of this one."""
    venv.create(tmp_path / "venv", symlinks=True)
    found = tmp_path / "venv" / "bin" / "python"
    packages = run(found, "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # .pth files in the folder that is named here are not read: an editable install stays out.
    (Path(packages) / "outer.pth").write_text(sysconfig.get_path("purelib"))
    return found


def run(python: Path | str, program: str, **environment: str) -> str:
    """Return what a program prints, run where no package lies beside it."""
    outer = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-c", program],
        env=outer | environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def pip(python: Path | str, compiler: Path, *words: str) -> None:
    """Run pip, which builds with the packages that are there, without network."""
    options = ("--no-index", "--no-deps", "--no-build-isolation")
    done = subprocess.run(
        [str(python), "-m", "pip", "--isolated", *words, *options],
        env={**os.environ, "CXX": str(compiler)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.parametrize("options", [(), ("--editable",)], ids=["normal", "editable"])
def test_install_without_a_compiler(options, source, python, tmp_path):
    compiler = tmp_path / "no-such-compiler"
    # The package of the outer environment is in sight, and is not to be removed.
    pip(python, compiler, "install", "--ignore-installed", *options, str(source))
    found = json.loads(run(python, _PROGRAM))
    assert Path(found["file"]).is_relative_to(source if options else tmp_path / "venv")
    assert found["version"] == steppo_kernels.__version__
    assert found["why"] == f"not built: no C++ compiler ({compiler}) when it was installed"
    assert found["auto"] == "reference"
    assert found["loss"] == -0.25
    assert found["grad"] == [[0.0, -0.25, -0.25, 0.0, 0.25]]


def test_wheel_with_a_compiler(source, tmp_path):
    real = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if real is None:
        pytest.skip("no C++ compiler")
    # The wheel holds the same files without optimization, which takes most of the time.
    compiler = tmp_path / "quick-compiler"
    compiler.write_text(f'#!/bin/sh\nexec {real} "$@" -O0\n')
    compiler.chmod(0o755)
    pip(sys.executable, compiler, "wheel", "--wheel-dir", str(tmp_path), str(source))

    (wheel,) = tmp_path.glob("*.whl")
    version = steppo_kernels.__version__
    assert wheel.name.startswith(f"steppo_kernels-{version}-cp")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"steppo_kernels-{version}.dist-info/METADATA").decode()
        archive.extractall(tmp_path / "unpacked")
    assert f"\nVersion: {version}\n" in metadata
    assert f"steppo_kernels/_C_cpu{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert {"steppo_kernels/py.typed", "steppo_kernels/_C_cpu.pyi"} <= set(names)
    assert {Path(name).parts[0] for name in names} == {
        "steppo_kernels",
        f"steppo_kernels-{version}.dist-info",
    }
    assert [name for name in names if Path(name).suffix in {".cpp", ".h", ".inc", ".missing"}] == []
    found = json.loads(run(sys.executable, _PROGRAM, PYTHONPATH=str(tmp_path / "unpacked")))
    assert Path(found["file"]).is_relative_to(tmp_path / "unpacked")
    assert (found["why"], found["auto"]) == (None, "cpu")
