"""Reads what nvcc makes of the CUDA kernels: no GPU is needed."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from machine_loops import Flow, flow_of

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("80", "90", "100")
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
# The sources that have kernels; the other one has what the host asks of CUDA.
KERNELS = [source for source in SOURCES if source.stem != "runtime"]
WIDE_LOAD, WIDE_STORE = (rf"{name}\.E[\w.]*\.128[\w.]*" for name in ("LDG", "STG"))
# What the units for fp64 do: arithmetic, and conversions from and to it.
FP64 = re.compile(r"\b(D(ADD|MUL|FMA|SETP|MNMX)\b|MUFU\.(RCP|RSQ)64H)")
FP64_CONVERSION = re.compile(r"\b(F2F|F2I|I2F|FRND)\.[\w.]*F64")
# No local memory, and no atomics on floating-point numbers, whose order is anybody's.
FORBIDDEN = re.compile(r"\b(LDL|STL)\b|\b(RED|ATOM[GS]?)\.[\w.]*(F32|F64|F16)")


class CannotRead(Exception):
    """A tool is not there."""


class Kernel(NamedTuple):
    """A kernel in machine code.

    Attributes:
        name: with its template arguments, without its namespace.
        registers: of a thread.
        stack: bytes of a thread in local memory, where registers go that are too many.
        shared: bytes of a block that are known when it is compiled.
        code: the instructions.
    """

    name: str
    registers: int
    stack: int
    shared: int
    code: str

    def count(self, instruction: str) -> int:
        """Return how often an instruction, a regular expression, stands in the code."""
        return len(re.findall(rf"\b{instruction}\b", self.code))

    @property
    def flow(self) -> Flow:
        """The instructions of its loops, and of what is in none."""
        return flow_of(self.code)

    @property
    def stream(self) -> tuple[str, ...]:
        """The instructions of the loop that takes the fewest of them for a load of 16 bytes."""
        streams = [loop.code for loop in self.flow.loops if wide_moves(loop.code)[0] > 0]
        return min(streams, key=lambda code: len(code) / wide_moves(code)[0])

    @property
    def wide_loads(self) -> int:
        """The loads of 16 bytes, wherever they are."""
        return self.count(WIDE_LOAD)

    @property
    def wide_stores(self) -> int:
        """The stores of 16 bytes, wherever they are."""
        return self.count(WIDE_STORE)


def wide_moves(code: Iterable[str]) -> tuple[int, int]:
    """Return the loads and the stores of 16 bytes among some instructions."""
    text = "\n".join(code)
    return len(re.findall(WIDE_LOAD, text)), len(re.findall(WIDE_STORE, text))


@functools.cache
def nvcc() -> str:
    """Return the compiler of the environment, as versions differ in what they spill."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "cu13/bin/nvcc"
        if path.exists():
            return str(path)
    found = os.environ.get("STEPPO_NVCC") or shutil.which("nvcc")
    if not found:
        raise CannotRead("no nvcc: make test installs it on x86-64 Linux")
    return found


def nvcc_version() -> str:
    """Return the version of the compiler."""
    (version,) = re.findall(r"release \S+, V(\S+)", _run(nvcc(), "--version"))
    return version


@functools.cache
def kernels(architecture: str) -> list[Kernel]:
    """Return every kernel for an architecture, such as "90"; each source is compiled by itself."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            cubin = Path(folder) / f"{source.stem}.cubin"
            _compile(source, architecture, cubin)
            found += _read(cubin) if source in KERNELS else []
    return found


def _compile(source: Path, architecture: str, cubin: Path) -> None:
    _run(
        nvcc(),
        "-std=c++17",
        "-O3",
        "--expt-relaxed-constexpr",
        "-Werror",
        "all-warnings",
        f"-I{ROOT / 'csrc/include'}",
        f"-I{ROOT / 'csrc'}",
        "-cubin",
        "-gencode",
        f"arch=compute_{architecture},code=sm_{architecture}",
        "-o",
        str(cubin),
        str(source),
    )


def _read(cubin: Path) -> list[Kernel]:
    usage = dict(
        re.findall(r"Function (\S+):\s+(REG.*)", _run(_tool("cuobjdump"), "-res-usage", str(cubin)))
    )
    parts = re.split(r"Function : (\S+)", _run(_tool("cuobjdump"), "-sass", str(cubin)))
    code = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert code.keys() == usage.keys() != set()
    found = []
    plain = _run("c++filt", *usage).splitlines()
    for mangled, name in zip(usage, plain, strict=True):
        number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage[mangled])}
        short = re.sub(r"^void |steppo::cuda::|\(anonymous namespace\)::|\(.*$", "", name)
        stack = number["STACK"] + number["LOCAL"]
        found.append(Kernel(short, number["REG"], stack, number["SHARED"], code[mangled]))
    return found


def _tool(name: str) -> str:
    """Return a tool that reads machine code, out of Triton's package."""
    spec = importlib.util.find_spec("triton")
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = Path(folder) / "backends/nvidia/bin" / name
        if path.exists():
            return str(path)
    raise CannotRead(f"no {name}: the package triton brings it")


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
    return done.stdout
