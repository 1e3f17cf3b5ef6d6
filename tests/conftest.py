"""Targets (backend and device), poisoned allocations and the hypothesis profile of the suite."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

import torch

if not torch.cuda.is_available():
    # Read once, when triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import numpy as np
import pytest
import third_party

from steppo_kernels import backends, memory

hypothesis.settings.register_profile(
    "derandomized",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("derandomized")


class Target(NamedTuple):
    """A backend and the device of the tensors it is given."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter, where large inputs take minutes."""
        return self.backend == "triton" and self.device == "cpu"

    def thin(self, *places: int, every: int) -> None:
        """Skip the cases of a grid but every so many, in the interpreter."""
        if self.interpreted and sum(places) % every:
            pytest.skip(f"the interpreter runs one case of {every}")


def _kernels() -> list[object]:
    on_gpu = ["triton"] if backends.why_not_cuda() else ["triton", "cuda"]
    return [
        *(_target(Target(name, "cpu")) for name in ("cpu", "triton")),
        *(_target(Target(name, "cuda"), pytest.mark.gpu) for name in on_gpu),
    ]


def _target(target: Target, *marks: pytest.MarkDecorator) -> object:
    why = backends.unavailable(target.backend, torch.device(target.device))
    if target.device == "cuda" and not torch.cuda.is_available():
        why = "torch sees no GPU"
    if why is not None:
        marks = (*marks, pytest.mark.skip(reason=f"{target.backend}: {why}"))
    name = target.backend if target.device == "cpu" else f"{target.backend}-gpu"
    return pytest.param(target, id=name, marks=marks)


def pytest_report_header() -> str:
    return third_party.versions()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    third_party.mark(items)


def pytest_configure(config: pytest.Config) -> None:
    third_party.refuse_deprecated_calls(config)
    # Tests run side by side; the tensors are small.
    torch.set_num_threads(1)
    if backends.triton_interprets():
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


@pytest.fixture(params=[_target(Target("reference", "cpu")), *_kernels()])
def target(request: pytest.FixtureRequest) -> Target:
    """Each backend that runs on this machine."""
    return request.param


@pytest.fixture(params=_kernels())
def kernel(request: pytest.FixtureRequest) -> Target:
    """Each of them but the reference, for tests that measure by it."""
    return request.param


@pytest.fixture(params=[False, True], ids=["layout", "mask"])
def masked(request: pytest.FixtureRequest) -> bool:
    """Whether the loss is given the mask (the fused kernel) or a layout."""
    return request.param


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
    # What is kept for the next call would not be poisoned again.
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
