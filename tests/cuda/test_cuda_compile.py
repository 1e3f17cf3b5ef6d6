"""The CUDA kernels as nvcc compiles them, without a GPU: what the machine code needs and moves."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import cuda_on_host
import pytest

ARCHITECTURES = ("80", "90", "100")
SOURCES = sorted((cuda_on_host.ROOT / "csrc/cuda").glob("*.cu"))
# What a kernel may need, of which two blocks of 256 threads are half of what an SM holds; and the
# kernels that work out a step in fp64, two blocks of which fill it.
MOST_REGISTERS = {"policy_loss_kernel": 128, "policy_loss_masked_kernel": 128}
MOST_SHARED = 48 << 10
# Loads that a thread has under way in rows of logits, forward; then loads and stores backward, by
# the types of logits and of their gradient. Gradients in fp64 are written number by number.
_HALF, _BFLOAT = "steppo::Half", "steppo::BFloat16"
_LOADS = {"float": 4, "double": 1, _HALF: 4, _BFLOAT: 4}
_MOVES = {
    ("float", "float"): (2, 2),
    ("float", _HALF): (2, 1),
    ("float", _BFLOAT): (2, 1),
    (_HALF, _HALF): (2, 2),
    (_BFLOAT, _BFLOAT): (2, 2),
}
_SWITCHES = ("false, false", "false, true", "true, false", "true, true")
# The kernels that move 16 bytes at once, at the least, and how often.
WIDE = {
    "broadcast_kernel<float, true>": (1, 1),
    "broadcast_kernel<double, true>": (1, 2),
    "segment_rows_kernel": (0, 1),
    "count_ids_kernel": (1, 0),
    "place_ids_kernel": (1, 0),
    "count_runs_kernel": (2, 0),
    "number_runs_kernel": (2, 1),
    "count_new_ids_kernel": (2, 0),
    "number_ids_kernel": (2, 1),
    "fill_kernel<float, true>": (0, 1),
    "fill_kernel<double, true>": (0, 1),
    **{
        f"token_log_probs_kernel<{logits}, {switches}>": (loads, 0)
        for logits, loads in _LOADS.items()
        for switches in _SWITCHES
    },
    **{
        f"token_log_probs_backward_kernel<{', '.join(types)}, {switches}>": moves
        for types, moves in _MOVES.items()
        for switches in _SWITCHES
    },
    "rewards_kernel<float, 1, true>": (2, 0),
    "rewards_kernel<float, 8, true>": (2, 0),
    "rewards_kernel<double, 1, true>": (3, 0),
    "rewards_kernel<double, 8, true>": (3, 0),
}
# No local memory, and no atomics on floating-point numbers, whose order is anybody's.
FORBIDDEN = re.compile(r"\b(LDL|STL)\b|\b(RED|ATOM[GS]?)\.[\w.]*(F32|F64|F16)")


class Kernel(NamedTuple):
    """A kernel in machine code."""

    name: str
    registers: int
    stack: int
    shared: int
    code: str

    def count(self, instruction: str) -> int:
        """Return how often an instruction stands in the code."""
        return len(re.findall(rf"\b{instruction}\b", self.code))


def nvcc() -> str:
    """Return the compiler of the environment, as versions differ in what they spill."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "cu13/bin/nvcc"
        if path.exists():
            return str(path)
    found = os.environ.get("STEPPO_NVCC") or shutil.which("nvcc")
    if not found:
        pytest.skip("no nvcc: make test installs it on x86-64 Linux")
    return found


def tool(name: str) -> str:
    """Return a tool that reads machine code, out of Triton's package."""
    triton = pytest.importorskip("triton")
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not path.exists():
        pytest.skip(f"no {name} in the package triton")
    return str(path)


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Every kernel for an architecture, each source compiled by itself."""
    found = []
    for source in SOURCES:
        cubin = str(tmp_path_factory.mktemp("cuda") / f"{source.stem}.cubin")
        arch = request.param
        run(
            nvcc(),
            "-std=c++17",
            "-O3",
            "--expt-relaxed-constexpr",
            "-Werror",
            "all-warnings",
            f"-I{cuda_on_host.ROOT / 'csrc/include'}",
            f"-I{cuda_on_host.ROOT / 'csrc'}",
            "-cubin",
            "-gencode",
            f"arch=compute_{arch},code=sm_{arch}",
            "-o",
            cubin,
            str(source),
        )
        # One source has no kernel.
        found += [] if source.stem == "runtime" else _read(cubin)
    assert found
    return found


def _read(cubin: str) -> list[Kernel]:
    usage = dict(
        re.findall(r"Function (\S+):\s+(REG.*)", run(tool("cuobjdump"), "-res-usage", cubin))
    )
    parts = re.split(r"\s+Function : (\S+)", run(tool("cuobjdump"), "-sass", cubin))
    code = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert code.keys() == usage.keys() != set()
    plain = run("c++filt", *usage).splitlines()
    found = []
    for mangled, name in zip(usage, plain, strict=True):
        number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage[mangled])}
        short = re.sub(r"^void |steppo::cuda::|\(anonymous namespace\)::|\(.*$", "", name)
        stack = number["STACK"] + number["LOCAL"]
        found.append(Kernel(short, number["REG"], stack, number["SHARED"], code[mangled]))
    return found


def test_kernels_keep_to_their_registers(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.stack == 0, kernel.name
        most = MOST_REGISTERS.get(kernel.name.split("<")[0], 64)
        assert kernel.registers <= most, kernel.name
        assert kernel.shared <= MOST_SHARED, kernel.name
        assert FORBIDDEN.search(kernel.code) is None, kernel.name


def test_streams_move_16_bytes_at_once(kernels: list[Kernel]) -> None:
    by_name = {kernel.name: kernel for kernel in kernels}
    for name, (loads, stores) in WIDE.items():
        assert by_name[name].count(r"LDG\.E[\w.]*\.128[\w.]*") >= loads, name
        assert by_name[name].count(r"STG\.E[\w.]*\.128[\w.]*") >= stores, name


def test_the_test_reads_what_it_is_about(kernels: list[Kernel]) -> None:
    """A kernel that moves number by number has no wide load, and code has stores at all."""
    (narrow,) = [kernel for kernel in kernels if kernel.name == "broadcast_kernel<float, false>"]
    assert narrow.count(r"LDG\.E[\w.]*\.128[\w.]*") == 0
    assert narrow.count(r"STG\.E[\w.]*") > 0
    assert FORBIDDEN.search("        RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2], R5 ;")
    assert FORBIDDEN.search("  STL [R1], R0 ;")
