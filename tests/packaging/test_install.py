"""Installs: without compilers, where the package does without C++, and the wheel that has it."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from installs import builder, pip, run

import steppo_kernels

# What two modules and Python files come to; without compression the CUDA kernels alone are more.
_MOST_BYTES = 8 << 20
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
    "why_cuda": choice.why_not_cuda(), "auto": choice.resolve("auto", mask.device),
    "loss": loss.item(), "grad": new.grad.tolist(),
}))
"""


@pytest.mark.parametrize("options", [(), ("--editable",)], ids=["normal", "editable"])
def test_install_without_a_compiler(options, source, python, tmp_path):
    compiler = str(tmp_path / "no-such-compiler")
    # The package of the outer environment is in sight, and is not to be removed.
    pip(python, "install", "--ignore-installed", *options, str(source), CXX=compiler)
    found = json.loads(run(python, _PROGRAM))
    assert Path(found["file"]).is_relative_to(source if options else tmp_path / "venv")
    assert found["version"] == steppo_kernels.__version__
    assert found["why"] == f"not built: no C++ compiler ({compiler}) when it was installed"
    # nvcc needs one as well.
    assert found["why_cuda"] == found["why"]
    assert found["auto"] == "reference"
    assert found["loss"] == -0.25
    assert found["grad"] == [[0.0, -0.25, -0.25, 0.0, 0.25]]


def test_wheel_with_compilers(source, tmp_path):
    real = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if real is None:
        pytest.skip("no C++ compiler")
    settings = {"CXX": shlex.quote(_quick(real, "-O0", tmp_path / "quick ones/c++"))}
    cuda = builder()
    try:
        nvcc = cuda.find_nvcc()
    except cuda.CannotBuild:
        settings["STEPPO_BUILD_CUDA"] = "0"
    else:
        settings |= {
            "STEPPO_NVCC": _quick(nvcc, "-Xcicc=-O0 -Xptxas=-O0", tmp_path / "quick ones/nvcc"),
            "STEPPO_CUDA_ARCHS": "90",
            "STEPPO_BUILD_CUDA": "1",
        }
    pip(sys.executable, "wheel", "--wheel-dir", str(tmp_path), str(source), **settings)

    (wheel,) = tmp_path.glob("*.whl")
    version = steppo_kernels.__version__
    assert wheel.name.startswith(f"steppo_kernels-{version}-cp")
    assert wheel.stat().st_size < _MOST_BYTES
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"steppo_kernels-{version}.dist-info/METADATA").decode()
        archive.extractall(tmp_path / "unpacked")
    assert f"\nVersion: {version}\n" in metadata
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    has_cuda = settings["STEPPO_BUILD_CUDA"] == "1"
    made = {f"_C_cpu{suffix}", f"_C_cuda{suffix}" if has_cuda else "_C_cuda.missing"}
    told = {"py.typed", "_C_cpu.pyi", "_C_cuda.pyi"}
    assert {Path(name).parts[0] for name in names} == {
        "steppo_kernels",
        f"steppo_kernels-{version}.dist-info",
    }
    # Nothing else of the build, and no source.
    in_package = [name for name in names if name.startswith("steppo_kernels/")]
    assert {Path(name).name for name in in_package if not name.endswith(".py")} == made | told
    found = json.loads(run(sys.executable, _PROGRAM, PYTHONPATH=str(tmp_path / "unpacked")))
    assert Path(found["file"]).is_relative_to(tmp_path / "unpacked")
    assert (found["why"], found["auto"]) == (None, "cpu")
    if not has_cuda:
        assert found["why_cuda"] == "not built: STEPPO_BUILD_CUDA=0 when it was installed"
    else:
        assert not (found["why_cuda"] or "").startswith(("not built", "built"))


def _quick(compiler: str, options: str, path: Path) -> str:
    """Return a compiler that leaves out optimization, which takes most of the time."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec "{compiler}" "$@" {options}\n')
    path.chmod(0o755)
    return str(path)
