"""Which implementation runs: what is installed, what a device can use, what `auto` means."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from typing import Literal, get_args

import torch

from ..config import one_of
from .modules import module_of
from .registry import refuse_recording

Backend = Literal["auto", "reference", "cpu", "triton", "cuda"]
BACKENDS: tuple[str, ...] = get_args(Backend)
OLDEST_TRITON = (3, 6)
# The kernels in csrc/cuda have instructions that older ones lack.
OLDEST_GPU = 80

# What `auto` tries on the tensors of a device, the fastest first. docs/gpu.md has the times of both
# on a GPU.
_FASTEST = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

_log = logging.getLogger("steppo_kernels")


@functools.cache
def why_not_cpu() -> str | None:
    """Return why the C++ backend cannot run here, or None if it can.

    Raises:
        ValueError: the environment variable STEPPO_ISA asks for what this CPU does not run.
    """
    try:
        module = module_of("cpu")
    except ImportError as error:
        return str(error)
    module.isa()
    return None


@functools.cache
def why_not_triton() -> str | None:
    """Return why the Triton backend cannot run here at all, or None if it can."""
    if why := _why_no_kernels():
        return why
    if (why := _why_no_gpu()) and not triton_interprets():
        return f"{why}, and TRITON_INTERPRET=1 is not set"
    return None


@functools.cache
def triton_interprets() -> bool:
    """Return whether Triton kernels run under its CPU interpreter (TRITON_INTERPRET=1)."""
    if _why_no_kernels():
        return False
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


@functools.cache
def _why_no_kernels() -> str | None:
    """Return why the Triton kernels cannot be loaded, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    # torch brings the Triton that it was built with, whatever this package asks for.
    found = importlib.import_module("triton").__version__
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"Triton {found} is installed, and the kernels take {oldest} or newer"
    return None


def _why_no_gpu() -> str | None:
    """Return why torch has no GPU here, or None if it has one."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "torch sees no GPU" if torch.version.hip else "torch is built for CPUs alone"
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    if driver == 0:
        return "torch finds no NVIDIA driver"
    if driver // 1000 < int(torch.version.cuda.split(".")[0]):
        return (
            f"the driver runs CUDA {driver // 1000}, and torch is built with CUDA "
            f"{torch.version.cuda}: update the driver"
        )
    return "torch sees no GPU"


@functools.cache
def why_not_cuda() -> str | None:
    """Return why the CUDA C++ backend cannot run here at all, or None if it can."""
    try:
        module = module_of("cuda")
    except ImportError as error:
        return str(error)
    if module.on_host:
        return None
    if torch.version.hip is not None:
        return "torch is built for AMD GPUs, and these kernels are for those of NVIDIA"
    if why := _why_no_gpu():
        return why
    driver, runtime = module.versions()
    if driver // 1000 < runtime // 1000:
        return (
            f"the driver runs CUDA {driver // 1000}, and the kernels were built with CUDA "
            f"{runtime // 1000}: update the driver, or install with the nvcc of CUDA "
            f"{driver // 1000}"
        )
    reasons = [_why_not_on(index) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


def _why_not_on(index: int) -> str | None:
    """Return why the CUDA kernels have no code for a GPU, or None if they have."""
    module = module_of("cuda")
    driver, runtime = module.versions()
    compiled = module.architectures.split()
    capability = torch.cuda.get_device_capability(index)
    # A driver translates what was compiled with its own CUDA or an older one.
    if _runs(capability, compiled, translates=driver >= runtime):
        return None
    name, number = torch.cuda.get_device_name(index), capability[0] * 10 + capability[1]
    if number < OLDEST_GPU:
        return f"{name} is of architecture {number}, and the kernels take {OLDEST_GPU} on"
    return (
        f"the kernels were built for {', '.join(compiled)}, and {name} is of architecture "
        f"{number}: install with {number} in STEPPO_CUDA_ARCHS"
    )


def _runs(capability: tuple[int, int], compiled: list[str], *, translates: bool) -> bool:
    """Whether a GPU runs code that was compiled for some, such as "90" or "100+PTX".

    Machine code runs on later GPUs of its generation. With `translates`, the driver makes machine
    code of PTX for every later GPU.
    """
    for name in compiled:
        number, _, kind = name.partition("+")
        built_for = divmod(int(number), 10)
        is_alike = capability[0] == built_for[0] or (kind == "PTX" and translates)
        if is_alike and capability >= built_for:
            return True
    return False


def cuda_on_host() -> bool:
    """Return whether the CUDA C++ kernels are those that tests build for the host."""
    return why_not_cuda() is None and bool(module_of("cuda").on_host)


def unavailable(backend: str, device: torch.device) -> str | None:
    """Return why `backend` cannot run on tensors of `device`, or None if it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return why_not_cpu() or (None if device.type == "cpu" else "it takes CPU tensors")
    if backend == "triton":
        if why := why_not_triton():
            return why
        runs = device.type == "cuda" or (device.type == "cpu" and triton_interprets())
        return None if runs else "it takes GPU tensors (or CPU tensors under TRITON_INTERPRET=1)"
    if why := why_not_cuda():
        return why
    taken = "cpu" if cuda_on_host() else "cuda"
    if device.type != taken:
        return f"it takes tensors on {taken}"
    if taken == "cpu":
        return None
    return _why_not_on(torch.cuda.current_device() if device.index is None else device.index)


def resolve(backend: str, device: torch.device) -> str:
    """Return the backend that runs a call on `device`.

    ``"auto"`` picks the fastest that runs there. A backend named explicitly never falls back.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
        RuntimeError: the named backend cannot run on `device`; the text says why. Or the call is
            recorded: that is said before sizes, which are tensors then, meet those of a GPU.
    """
    if type(backend) is not str or backend not in BACKENDS:
        one_of("backend", backend, BACKENDS)
    chosen = _resolved(backend, device)
    refuse_recording(chosen)
    return chosen


# What `torch.compiler.assume_constant_result` sets, without its import of all of dynamo: a compiled
# graph takes the answer as a constant instead of tracing the imports behind it.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _resolved(backend: str, device: torch.device) -> str:
    if backend != "auto":
        if why := unavailable(backend, device):
            raise RuntimeError(
                f"backend: {backend!r} cannot run on {device.type} tensors here: {why}"
            )
        return backend
    reasons = []
    for wanted in _FASTEST.get(device.type, ()):
        why = unavailable(wanted, device)
        if why is None:
            return wanted
        reasons.append(f"no {wanted!r}: {why}")
    _log.info("backend 'auto' is 'reference' on %s tensors: %s", device.type, "; ".join(reasons))
    return "reference"
