"""Builds CUDA sources for the host: see cuda/cuda_on_host.h.

As a program it prints the module of all kernels, which backend "cuda" then takes on CPU tensors:
STEPPO_CUDA_ON_HOST=$(python tests/cuda_on_host.py) steppo-kernels validate --backend cuda

With the arguments of ``whole_program`` it prints that program.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).parents[1]
_HERE = Path(__file__).parent / "cuda"
_MADE = ROOT / "build" / "cuda_on_host"
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


def contraction() -> list[str]:
    """Return the flags with which a compiler makes FMAs of products and sums, as nvcc does.

    There are none where the processor has no such instruction.
    """
    machine, facts = platform.machine(), Path("/proc/cpuinfo")
    if machine in ("aarch64", "arm64"):
        return ["-ffp-contract=fast"]
    if machine == "x86_64" and facts.exists() and " fma " in facts.read_text():
        return ["-ffp-contract=fast", "-mfma"]
    return []


# The orders in which programs run the threads of a kernel: seeds, and the number of blocks whose
# threads take turns.
ORDERS = [("0", "1"), ("1", "1"), ("5", "2")]


class CannotBuild(Exception):
    """The sources, a compiler or pybind11 are not there."""


def program(name: str, *flags: str) -> Path:
    """Return the program that tests/cuda/<name>.cpp is, built with further flags."""
    return _built(name, [_HERE / f"{name}.cpp"], flags)


def whole_program(name: str, *flags: str) -> Path:
    """Return the program that tests/cuda/<name>/ is, which calls operators: with all kernels."""
    return _built(name, [*sorted((_HERE / name).glob("*.cpp")), *_kernels()], flags)


def module() -> Path:
    """Return the module of all kernels."""
    try:
        import pybind11
    except ImportError as error:
        raise CannotBuild(str(error)) from error
    includes = (pybind11.get_include(), sysconfig.get_path("include"))
    sources = [*_kernels(), ROOT / "python/bindings_cuda.cpp"]
    flags = ["-O2", "-shared", "-fvisibility=hidden"]
    flags += ['-DSTEPPO_COMPILER="of the host"', '-DSTEPPO_ARCHITECTURES=""']
    if sanitizers := os.environ.get("STEPPO_SANITIZE"):
        flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined"]
    return _built("_C_cuda.so", sources, [*flags, *(f"-isystem{path}" for path in includes)])


class Order(Protocol):
    """Sets how the next launches run: see ``Options`` in cuda/host_threads.h."""

    def __call__(self, seed: int, resident: int, most_blocks: int = 0) -> None: ...


def order_of(module: Path) -> Order:
    """Return what sets the order in which the threads of a module's kernels run."""
    library = ctypes.CDLL(str(module))
    library.order_of_threads.argtypes = ctypes.c_uint64, ctypes.c_int
    library.limit_blocks.argtypes = (ctypes.c_int64,)

    def order(seed: int, resident: int, most_blocks: int = 0) -> None:
        library.order_of_threads(seed, resident)
        library.limit_blocks(most_blocks)

    return order


def launches_of(module: Path) -> Callable[[], int]:
    """Return what tells how many launches of a module's kernels there were."""
    library = ctypes.CDLL(str(module))
    library.count_of_launches.restype = ctypes.c_uint64
    count: Callable[[], int] = library.count_of_launches
    return count


def _kernels() -> list[Path]:
    found = [path for path in (ROOT / "csrc/cuda").glob("*.cu") if path.stem != "runtime"]
    return [*sorted(found), _HERE / "host_runtime.cpp"]


def _built(name: str, sources: list[Path], flags: Iterable[str]) -> Path:
    """Return what a compiler makes of sources; what was made of the same before is used again."""
    compiler = _compiler()
    words = [*compiler, *_FLAGS, *contraction(), *flags]
    version = subprocess.check_output([*compiler, "--version"], text=True)
    digest = hashlib.sha256(repr((words, sources, version)).encode())
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
            objects = [target.with_name(f"{source.name}.o") for source in sources]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for _ in pool.map(
                    lambda source, made: _run(
                        *words, "-x", "c++", "-c", str(source), "-o", str(made)
                    ),
                    sources,
                    objects,
                ):
                    pass
            made = target.with_suffix(".part")
            _run(*words, *map(str, objects), "-o", str(made))
            made.rename(target)
    return target


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _compiler() -> list[str]:
    if not (ROOT / "csrc").is_dir():
        raise CannotBuild("no csrc/: the package is installed without its sources")
    for words in map(shlex.split, (os.environ.get("CXX") or "c++", "g++", "clang++")):
        if shutil.which(words[0]):
            return words
    raise CannotBuild("no C++ compiler")


if __name__ == "__main__":
    words = sys.argv[1:]
    print(whole_program(*words) if words else module())
