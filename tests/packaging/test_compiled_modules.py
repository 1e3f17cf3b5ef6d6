"""The compiled modules as they are installed: what they hold, tell and need."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import installs
import pytest

import steppo_kernels

_PACKAGE = Path(steppo_kernels.__file__).parent
_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
_MOST_BYTES = 9 << 20
# The kernel would read and write anywhere. It is launched where nothing can run it.
_LAUNCH = """
import json, sys
from steppo_kernels import _C_cuda

driver, runtime = _C_cuda.versions()
if driver:
    sys.exit(print(json.dumps({"driver": driver})))
broadcast = {"dtype": 0, "per_step": 16, "step_ids": 16, "num_tokens": 4, "per_token": 16}
try:
    _C_cuda.broadcast_to_tokens(
        tuple(broadcast[name] for name in _C_cuda.records["Broadcast"]), (0, 16, 0, 0)
    )
except RuntimeError as error:
    print(json.dumps({"driver": driver, "runtime": runtime, "error": str(error)}))
"""


def file_of(name: str) -> Path:
    path = _PACKAGE / f"{name}{_SUFFIX}"
    if not path.exists():
        note = _PACKAGE / f"{name}.missing"
        pytest.skip(note.read_text().strip() if note.exists() else f"{name} is not built")
    return path


def loaded(name: str) -> ModuleType:
    """Return a module from its file: backend `cuda` may be another that tests have built.

    The name is one that nothing else has: pybind11 makes one module a name, of whatever file.
    """
    spec = importlib.util.spec_from_file_location(f"installed.{name}", file_of(name))
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def printed(*words: str, folder: Path | None = None) -> str:
    if shutil.which(words[0]) is None:
        pytest.skip(f"no {words[0]}")
    return subprocess.run(words, capture_output=True, text=True, check=True, cwd=folder).stdout


def tool(name: str) -> str:
    """Return a tool that reads machine code, out of Triton's package."""
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "backends/nvidia/bin" / name
        if path.exists():
            return str(path)
    pytest.skip(f"no {name} in the package triton")


@pytest.mark.parametrize("name", ["_C_cpu", "_C_cuda"])
def test_the_stub_names_what_a_module_has(name):
    module = loaded(name)
    body = ast.parse((_PACKAGE / f"{name}.pyi").read_text()).body
    told = {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    told |= {node.name for node in body if isinstance(node, ast.FunctionDef)} - {"__getattr__"}
    assert {found for found in vars(module) if not found.startswith("__")} == told | {
        *module.operators
    }


def test_operators_of_cuda_take_what_those_of_the_cpu_take():
    """One launcher serves both."""
    cpu, cuda = loaded("_C_cpu"), loaded("_C_cuda")
    own = cuda.operators.keys() - cpu.operators.keys()
    assert own == {"kept_directions", "scale_directions", "scale_gradient"}
    shared = {name: takes for name, takes in cuda.operators.items() if name not in own}
    assert shared.items() <= cpu.operators.items()
    for name in {record for takes in shared.values() for record in takes}:
        assert cuda.records[name] == cpu.records[name]


def test_a_launch_without_a_driver_raises_with_the_name_of_the_operator():
    file_of("_C_cuda")
    package = str(_PACKAGE.parent)
    found = json.loads(installs.run(sys.executable, _LAUNCH, PYTHONPATH=package))
    if found["driver"]:
        pytest.skip(f"a driver of CUDA {found['driver']} is there")
    assert found["runtime"] >= 12000
    assert re.match(r"broadcast_to_tokens: cudaError\w+: \w", found["error"])


def test_the_cuda_module_says_what_it_holds():
    """Machine code of each architecture, and of each kernel there."""
    module, path = loaded("_C_cuda"), str(file_of("_C_cuda"))
    assert re.fullmatch(r"nvcc \d+\.\d+\.\d+", module.compiler)
    assert not module.on_host
    told = module.architectures.split()
    *_, newest = told
    assert newest.endswith("+PTX")
    held = {
        kind: set(re.findall(r"\.sm_(\d+)\.", printed(tool("cuobjdump"), f"-l{kind}", path)))
        for kind in ("elf", "ptx")
    }
    assert held["elf"] == {name.removesuffix("+PTX") for name in told}
    assert held["ptx"] == {newest.removesuffix("+PTX")}
    for number in held["elf"]:
        usage = printed(tool("cuobjdump"), "-res-usage", "-arch", f"sm_{number}", path)
        assert usage.count(" Function ") == module.num_kernels() > 0


def test_the_cuda_module_keeps_its_runtime_to_itself():
    """Torch loads another one, whose names every module would find before its own."""
    path = str(file_of("_C_cuda"))
    exported = [
        line.split()[-1] for line in printed("nm", "-D", "--defined-only", path).splitlines()
    ]
    assert "PyInit__C_cuda" in exported
    assert [name for name in exported if "cuda" in name.lower()] == ["PyInit__C_cuda"]
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", printed("readelf", "-d", path))
    assert "libc.so.6" in needed
    assert [name for name in needed if "cuda" in name] == []


def test_the_cuda_module_is_compressed(tmp_path):
    """Its kernels alone are more than three times as much otherwise."""
    path = file_of("_C_cuda")
    printed(tool("cuobjdump"), "-xelf", "all", str(path), folder=tmp_path)
    kernels = sum(one.stat().st_size for one in tmp_path.glob("*.cubin"))
    assert path.stat().st_size < min(kernels / 3, _MOST_BYTES)
