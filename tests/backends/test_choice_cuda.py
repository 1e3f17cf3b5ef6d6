"""Why backend `cuda` does not run: a sentence for each thing that a machine can lack."""

from __future__ import annotations

import importlib.machinery
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import steppo_kernels
from steppo_kernels.backends import choice, modules

_ROOT = Path(__file__).parents[2]
_SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]

GPU = tuple[str, tuple[int, int]]
H100, A100, A10 = ("H100", (9, 0)), ("A100", (8, 0)), ("A10", (8, 6))
B300, RTX_5090 = ("B300", (10, 3)), ("RTX 5090", (12, 0))
T4 = ("T4", (7, 5))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a machine of GPUs, a driver, and kernels that were built somehow."""

    def make(
        *gpus: GPU,
        compiled: str = "80 90 100+PTX",
        versions: tuple[int, int] = (13000, 13000),
        on_host: bool = False,
        hip: str | None = None,
        torch_cuda: str | None = "13.0",
    ) -> None:
        module = SimpleNamespace(on_host=on_host, versions=lambda: versions, architectures=compiled)
        monkeypatch.setattr(choice, "module_of", lambda _: module)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.version, "cuda", None if hip else torch_cuda)
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: versions[0], raising=False)
        for name, answer in {
            "is_available": lambda: bool(gpus),
            "device_count": lambda: len(gpus),
            "get_device_name": lambda index: gpus[index][0],
            "get_device_capability": lambda index: gpus[index][1],
            "current_device": lambda: 0,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    return make


def why_not() -> str | None:
    """What `why_not_cuda` says of the machine; it keeps what it said of another."""
    return choice.why_not_cuda.__wrapped__()


@pytest.mark.parametrize(
    ("gpus", "compiled", "versions"),
    [
        ([H100], "80 90 100+PTX", (13000, 13000)),
        ([H100, A100], "80 90 100+PTX", (13000, 13000)),
        # Machine code runs on later GPUs of a generation.
        ([A10], "80 90 100+PTX", (13000, 13000)),
        ([B300], "80 90 100", (13000, 13000)),
        # PTX runs on every later one.
        ([RTX_5090, H100], "80 90 100+PTX", (13000, 13000)),
        ([H100], "80+PTX", (13010, 13000)),
        # A driver runs machine code of a newer CUDA, if it has the same major version.
        ([H100], "80 90 100+PTX", (13000, 13010)),
        ([H100], "80 90+PTX", (13000, 12060)),
    ],
)
def test_kernels_run(machine, gpus, compiled, versions):
    machine(*gpus, compiled=compiled, versions=versions)
    assert why_not() is None


def test_kernels_of_the_host_need_no_gpu(machine):
    machine(on_host=True, compiled="", versions=(0, 0))
    assert why_not() is None


@pytest.mark.parametrize(
    ("gpus", "options", "why"),
    [
        ([], {}, "torch sees no GPU"),
        ([], {"torch_cuda": None, "versions": (0, 13000)}, "torch is built for CPUs alone"),
        ([], {"versions": (0, 13000)}, "torch finds no NVIDIA driver"),
        (
            [],
            {"versions": (12080, 13000)},
            "the driver runs CUDA 12, and torch is built with CUDA 13.0: update the driver",
        ),
        (
            [H100],
            {"hip": "6.4"},
            "torch is built for AMD GPUs, and these kernels are for those of NVIDIA",
        ),
        (
            [H100],
            {"versions": (12080, 13000)},
            "the driver runs CUDA 12, and the kernels were built with CUDA 13: update the driver, "
            "or install with the nvcc of CUDA 12",
        ),
        (
            [H100],
            {"compiled": "80"},
            "the kernels were built for 80, and H100 is of architecture 90: install with 90 in "
            "STEPPO_CUDA_ARCHS",
        ),
        # Machine code does not run on earlier GPUs of a generation, nor on those of the next.
        (
            [A100],
            {"compiled": "86"},
            "the kernels were built for 86, and A100 is of architecture 80: install with 80 in "
            "STEPPO_CUDA_ARCHS",
        ),
        (
            [A100],
            {"compiled": "90 100+PTX"},
            "the kernels were built for 90, 100+PTX, and A100 is of architecture 80: install with "
            "80 in STEPPO_CUDA_ARCHS",
        ),
        # A driver does not translate what a newer CUDA wrote.
        (
            [RTX_5090],
            {"versions": (13000, 13010)},
            "the kernels were built for 80, 90, 100+PTX, and RTX 5090 is of architecture 120: "
            "install with 120 in STEPPO_CUDA_ARCHS",
        ),
        ([T4], {}, "T4 is of architecture 75, and the kernels take 80 on"),
    ],
)
def test_what_a_machine_lacks(machine, gpus, options, why):
    machine(*gpus, **options)
    assert why_not() == why


def test_triton_says_why_there_is_no_gpu(machine, monkeypatch):
    machine(versions=(0, 13000))
    monkeypatch.setattr(choice, "_why_no_kernels", lambda: None)
    monkeypatch.setattr(choice, "triton_interprets", lambda: False)
    why = "torch finds no NVIDIA driver, and TRITON_INTERPRET=1 is not set"
    assert choice.why_not_triton.__wrapped__() == why


def test_each_gpu_has_its_own_answer(machine, monkeypatch):
    machine(H100, T4, A100, compiled="90")
    assert why_not() is None
    monkeypatch.setattr(choice, "why_not_cuda", lambda: None)
    wanted = [
        None,
        "T4 is of architecture 75, and the kernels take 80 on",
        "the kernels were built for 90, and A100 is of architecture 80: install with 80 in "
        "STEPPO_CUDA_ARCHS",
    ]
    assert [choice.unavailable("cuda", torch.device("cuda", k)) for k in range(3)] == wanted
    # Without an index, it is the current one.
    assert choice.unavailable("cuda", torch.device("cuda")) is None
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert choice.unavailable("cuda", torch.device("cuda")) == wanted[1]
    monkeypatch.setattr(choice, "why_not_triton", lambda: None)
    resolved = [choice._resolved.__wrapped__("auto", torch.device("cuda", k)) for k in range(3)]
    assert resolved == ["cuda", "triton", "triton"]
    with pytest.raises(RuntimeError, match="cannot run on cuda tensors here: T4 is of arch"):
        choice._resolved.__wrapped__("cuda", torch.device("cuda", 1))


def test_the_oldest_gpu_is_the_first_that_is_compiled_for():
    source = _ROOT / "building/cuda.py"
    if not source.exists():
        pytest.skip("no building/: the package is installed without its sources")
    listed = re.search(r"^ARCHITECTURES = \((.*)\)$", source.read_text(), re.MULTILINE)
    assert listed is not None
    assert listed[1].split(",")[0].strip('"') == str(choice.OLDEST_GPU)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_call_says_why(monkeypatch, device):
    monkeypatch.setattr(choice, "why_not_cuda", lambda: "not built: the reason")
    assert choice.unavailable("cuda", torch.device(device)) == "not built: the reason"


@pytest.mark.parametrize(("on_host", "taken"), [(True, "cpu"), (False, "cuda")])
def test_tensors_that_the_kernels_take(monkeypatch, on_host, taken):
    monkeypatch.setattr(choice, "why_not_cuda", lambda: None)
    monkeypatch.setattr(choice, "module_of", lambda _: SimpleNamespace(on_host=on_host))
    monkeypatch.setattr(choice, "_why_not_on", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for device in ("cpu", "cuda"):
        why = None if device == taken else f"it takes tensors on {taken}"
        assert choice.unavailable("cuda", torch.device(device)) == why


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a package that has no compiled module, nor a note."""
    monkeypatch.setattr(steppo_kernels, "__path__", [str(tmp_path)])
    # The finder of an editable install looks elsewhere.
    monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
    monkeypatch.setattr(modules, "_PACKAGE", tmp_path)
    monkeypatch.delitem(sys.modules, "steppo_kernels._C_cuda", raising=False)
    monkeypatch.delenv("STEPPO_CUDA_ON_HOST", raising=False)
    monkeypatch.setattr(choice, "module_of", modules.module_of.__wrapped__)
    return tmp_path


def test_the_note_says_why_there_is_no_module(package):
    assert why_not() == "not built: No module named 'steppo_kernels._C_cuda'"
    (package / "_C_cuda.missing").write_text("not built: the compiler was tired\n")
    assert why_not() == "not built: the compiler was tired"


def test_a_module_that_cannot_be_loaded_is_not_said_to_be_missing(package):
    (package / f"_C_cuda{_SUFFIX}").write_text("this is no library\n")
    # A note that an earlier build left says nothing of this one.
    (package / "_C_cuda.missing").write_text("not built: the compiler was tired\n")
    assert why_not().startswith(f"built, but it cannot be loaded: {package}/_C_cuda{_SUFFIX}: ")


@pytest.mark.parametrize("path", ["1", "no/such/file.so"])
def test_the_module_of_the_host_is_not_there(package, monkeypatch, path):
    monkeypatch.setenv("STEPPO_CUDA_ON_HOST", path)
    assert why_not() == (
        f"STEPPO_CUDA_ON_HOST: got {path!r}, expected the file that tests/cuda_on_host.py builds "
        "and prints"
    )
