"""Targets (backend and device), poisoned allocations and the hypothesis profile of the suite."""

from __future__ import annotations

import contextlib
import os
import sys
import zlib
from pathlib import Path

import cuda_on_host
import torch

if not torch.cuda.is_available():
    # Read once, when triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Read once, when a backend is first asked for. "0" leaves these kernels out.
    if os.environ.get("STEPPO_CUDA_ON_HOST", "1") == "1":
        with contextlib.suppress(cuda_on_host.CannotBuild):
            os.environ["STEPPO_CUDA_ON_HOST"] = str(cuda_on_host.module())

import numpy as np
import pytest
import third_party
from targets import Target

from steppo_kernels.backends import choice
from steppo_kernels.log_probs import memory

try:
    import hypothesis
except ModuleNotFoundError:
    # A machine with a GPU and no network may lack it. The other tests run all the same.
    hypothesis = None
else:
    hypothesis.settings.register_profile(
        "derandomized",
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("derandomized")


def _kernels() -> list[Target]:
    """The backends beside the reference, as far as the machine can run them.

    A backend that is not installed is among them: its tests are skipped, which says so.
    """
    found = [Target("cpu", "cpu")]
    if torch.cuda.is_available():
        found.append(Target("triton", "cuda"))
        if not choice.why_not_cuda():
            found.append(Target("cuda", "cuda"))
    else:
        found += [Target("triton", "cpu"), Target("cuda", "cpu")]
    return found


KERNELS = _kernels()
TARGETS = [Target("reference", "cpu"), *KERNELS]
_BY_FIXTURE = {
    "target": TARGETS,
    "kernel": KERNELS,
    "gpu_kernel": [kernel for kernel in KERNELS if kernel.backend != "cpu"],
}


def _parameter(target: Target, *values: object, name: str = "") -> object:
    why = choice.unavailable(target.backend, torch.device(target.device))
    marks = [pytest.mark.skip(reason=f"{target.backend}: {why}")] if why else []
    if target.device == "cuda":
        marks.append(pytest.mark.gpu)
    return pytest.param(target, *values, id=f"{target.name}{name and '-'}{name}", marks=marks)


def pytest_report_header() -> list[str]:
    runs, lacks = [], []
    for target in TARGETS:
        why = choice.unavailable(target.backend, torch.device(target.device))
        where = "as a GPU's, on the CPU" if target.emulated else f"on {target.device}"
        runs += [] if why else [f"{target.backend} {where}"]
        lacks += [f"{target.backend}: {why}; its tests are skipped"] if why else []
    if hypothesis is None:
        lacks.append("hypothesis is missing: the files that need it are not collected")
    if not torch.cuda.is_available():
        lacks.append("no GPU: triton-gpu and cuda-gpu are not collected")
    return [third_party.versions(), f"backends: {', '.join(runs)}", *lacks]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the files that need hypothesis where it is missing; the header says so."""
    is_test = collection_path.match("test_*.py")
    if hypothesis is None and is_test and third_party.needs(collection_path, "hypothesis"):
        return True
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test with a mark of `grids.grid` its targets, each with the cases that it runs."""
    mark = metafunc.definition.get_closest_marker("grid")
    if mark is None:
        return
    (grid,) = mark.args
    if "masked" in metafunc.fixturenames:
        grid = grid._replace(axes={**grid.axes, "masked": _MASKED})
    fixture = next(name for name in _BY_FIXTURE if name in metafunc.fixturenames)
    parameters = [
        _parameter(target, *case.values, name=case.name)
        for target in _BY_FIXTURE[fixture]
        for case in grid.cases(interpreted=target.interpreted)
    ]
    # A mark comes before the parameters of the fixtures that it names.
    metafunc.definition.add_marker(pytest.mark.parametrize((fixture, *grid.axes), parameters))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    third_party.mark(items)


def pytest_configure(config: pytest.Config) -> None:
    third_party.refuse_deprecated_calls(config)
    # Tests run side by side; the tensors are small.
    torch.set_num_threads(1)
    if choice.triton_interprets():
        _round_to_bfloat16()


def _round_to_bfloat16() -> None:
    """Let Triton's interpreter round fp32 to bf16, as every GPU does: it drops bits instead."""
    from triton import language
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, source, result, mode):
        if (source, result) != (language.float32, language.bfloat16):
            return convert(values, source, result, mode)
        bits = values.view("uint32")
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype("uint16")

    interpreter._convert_float = rounding


@pytest.fixture(params=[_parameter(target) for target in TARGETS])
def target(request: pytest.FixtureRequest) -> Target:
    """Each backend that runs on this machine."""
    return request.param


@pytest.fixture(params=[_parameter(kernel) for kernel in KERNELS])
def kernel(request: pytest.FixtureRequest) -> Target:
    """Each of them but the reference, for tests that measure by it."""
    return request.param


@pytest.fixture(params=[_parameter(kernel) for kernel in _BY_FIXTURE["gpu_kernel"]])
def gpu_kernel(request: pytest.FixtureRequest) -> Target:
    """Each of these that is of GPUs, for what a CPU has no use for."""
    return request.param


_MASKED = {"layout": False, "mask": True}


@pytest.fixture(params=list(_MASKED.values()), ids=list(_MASKED))
def masked(request: pytest.FixtureRequest) -> bool:
    """Whether the loss is given the mask (the fused kernel) or a layout."""
    return request.param


@pytest.fixture(autouse=True)
def order_of_threads(request: pytest.FixtureRequest) -> None:
    """Run the threads of CUDA kernels on the host in an order that the test's name draws."""
    if choice.cuda_on_host():
        drawn = zlib.crc32(request.node.nodeid.encode())
        cuda_on_host.order_of(Path(os.environ["STEPPO_CUDA_ON_HOST"]))(drawn, 1 + drawn % 2)


_GARBAGE = {torch.bool: 1, torch.uint8: 0x5A, torch.int8: 0x5A, torch.int16: 0x5A5A}


def _poison(made: torch.Tensor) -> torch.Tensor:
    if made.is_floating_point():
        return made.fill_(torch.nan)
    return made.fill_(_GARBAGE.get(made.dtype, -0x5A5A5A5A))


@pytest.fixture(autouse=True)
def poisoned_allocations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the package allocates with NaN or garbage, so that an unwritten output shows."""
    if request.node.get_closest_marker("unpoisoned"):
        return
    # Memory kept for the next call would not be poisoned again.
    monkeypatch.setattr(memory, "KEPT_BYTES", 0)
    monkeypatch.setattr(memory, "KEPT_GRADIENT_BYTES", 0)
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        allocate = getattr(owner, name)

        def poisoned(*args: object, _allocate=allocate, **options: object) -> torch.Tensor:
            made = _allocate(*args, **options)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return _poison(made) if caller.startswith("steppo_kernels") else made

        monkeypatch.setattr(owner, name, poisoned)


@pytest.fixture
def threads_restored() -> object:
    """Restore the number of threads that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
