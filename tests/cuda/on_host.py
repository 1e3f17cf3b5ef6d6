"""Builds CUDA sources for the host: see cuda_on_host.h."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
_HERE = Path(__file__).parent
_MADE = ROOT / "build" / "cuda_on_host"
_MODULE = "_C_cuda_host"
_FLAGS = [
    "-std=c++17",
    "-g",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-DSTEPPO_CUDA_ON_HOST",
    f"-I{ROOT / 'csrc/include'}",
    f"-I{ROOT / 'csrc/cuda'}",
    f"-I{_HERE}",
]


def program(name: str, *flags: str) -> Path:
    """Return the program that tests/cuda/<name>.cpp is, built with further flags."""
    return _built(name, [_HERE / f"{name}.cpp"], flags)


def whole_program(name: str, *flags: str) -> Path:
    """Return such a program that calls operators: all kernels are built with it."""
    return _built(name, [_HERE / f"{name}.cpp", *_kernels()], flags)


def module() -> ModuleType:
    """Return the module of all kernels, built for the host."""
    pybind11 = pytest.importorskip("pybind11")
    includes = (pybind11.get_include(), sysconfig.get_path("include"))
    sources = [*_kernels(), ROOT / "python/bindings_cuda.cpp", _HERE / "order.cpp"]
    flags = ["-O2", "-shared", "-fvisibility=hidden", f"-DSTEPPO_MODULE={_MODULE}"]
    if sanitizers := os.environ.get("STEPPO_SANITIZE"):
        flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined"]
    path = _built(f"{_MODULE}.so", sources, [*flags, *(f"-isystem{path}" for path in includes)])
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    found.order = _order(path)
    return found


def _kernels() -> list[Path]:
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


def _order(path: Path) -> Callable[[int, int], None]:
    """Return what sets a seed and the number of blocks whose threads take turns."""
    order = ctypes.CDLL(str(path)).order_of_threads
    order.argtypes = ctypes.c_uint64, ctypes.c_int
    return order


def _built(name: str, sources: Iterable[Path], flags: Iterable[str]) -> Path:
    """Return what a compiler makes of sources; what was made of the same before is used again."""
    compiler = _compiler()
    words = [*compiler, *_FLAGS, *flags, "-x", "c++", *map(str, sources)]
    version = subprocess.check_output([*compiler, "--version"], text=True)
    digest = hashlib.sha256(repr((words, version)).encode())
    for folder in ("csrc", "python", "tests/cuda"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".cpp", ".cu", ".cuh", ".h", ".inc"):
                digest.update(path.read_bytes())
    target = _MADE / digest.hexdigest()[:16] / name
    target.parent.mkdir(parents=True, exist_ok=True)
    # Several processes of pytest want the same.
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            made = target.with_suffix(".part")
            done = subprocess.run(
                [*words, "-o", str(made)], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            made.rename(target)
    return target


def _compiler() -> list[str]:
    if not (ROOT / "csrc").is_dir():
        pytest.skip("no csrc/: the package is installed without its sources")
    for words in map(shlex.split, (os.environ.get("CXX") or "c++", "g++", "clang++")):
        if shutil.which(words[0]):
            return words
    pytest.skip("no C++ compiler")
