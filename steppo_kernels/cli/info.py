"""What is installed here, and what of it runs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import __version__
from ..backends import choice, modules


def collect() -> dict[str, Any]:
    """Return versions, backends and devices, as JSON can hold them."""
    return {
        "versions": {
            "steppo-kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        },
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "backends": {name: _backend(name) for name in choice.BACKENDS if name != "auto"},
        "devices": _devices(),
    }


def show(facts: dict[str, Any], console: Console) -> None:
    """Print what `collect` returns."""
    for line in headline(facts):
        console.print(line, highlight=False)

    table = Table(title="backends", title_justify="left")
    for name in ("backend", "runs", "on", "about"):
        table.add_column(name)
    for name, backend in facts["backends"].items():
        about = backend["why_not"] or "; ".join(
            f"{key.replace('_', ' ')} {', '.join(value) if isinstance(value, list) else value}"
            for key, value in backend["details"].items()
        )
        runs = "[green]yes[/]" if backend["available"] else "[red]no[/]"
        # What a compiler complained of may have brackets.
        table.add_row(name, runs, ", ".join(backend["devices"]), escape(about))
    console.print(table)

    table = Table(title="devices", title_justify="left")
    for name in ("device", "name", "about", "backend 'auto'"):
        table.add_column(name)
    for device in facts["devices"]:
        table.add_row(device["device"], device["name"], device["about"], device["auto"])
    console.print(table)


def headline(facts: dict[str, Any]) -> tuple[str, str]:
    """Return the versions and the platform of what `collect` returns, a line each."""
    versions = ", ".join(f"{name} {v}" for name, v in facts["versions"].items() if v is not None)
    return versions, f"{facts['platform']}, {facts['threads']} threads"


def load() -> float | None:
    """Return how many processes wanted a core over the last minute; None if nobody counts them."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backend(name: str) -> dict[str, Any]:
    # GPUs come first: why one of them is not taken says more than that a CPU is none.
    devices = sorted(torch_devices(), key=lambda device: device.type == "cpu")
    reasons = [(device.type, choice.unavailable(name, device)) for device in devices]
    runs_on = sorted({kind for kind, why in reasons if why is None})
    # A backend that is whole, but has no device of its kind here, is missing all the same.
    why_not = None if runs_on else reasons[0][1]
    details: dict[str, Any] = {}
    if runs_on and name == "cpu":
        module = modules.module_of("cpu")
        details = {
            "instruction_set": module.isa(),
            "compiled_for": module.isas().split(", "),
            "compiler": module.compiler(),
        }
    elif runs_on and name == "cuda":
        details = _about_cuda()
    elif runs_on and name == "triton":
        details = {"interpreter": "on, on CPU tensors" if choice.triton_interprets() else "off"}
    return {
        "available": bool(runs_on),
        "why_not": why_not,
        "devices": runs_on,
        "details": details,
    }


def _about_cuda() -> dict[str, Any]:
    module = modules.module_of("cuda")
    if module.on_host:
        return {"on_the_host": "by tests"}
    driver, runtime = (f"{found // 1000}.{found % 1000 // 10}" for found in module.versions())
    return {
        "compiled_for": module.architectures.split(),
        "compiler": module.compiler,
        "built_with_cuda": runtime,
        "driver_runs_cuda": driver,
    }


def torch_devices() -> list[torch.device]:
    """Return the CPU and every GPU that torch sees."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(gpus))]


def _devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for device in torch_devices():
        if device.type == "cpu":
            name = _cpu_name()
            about = f"torch uses {torch.backends.cpu.get_cpu_capability()}"
        else:
            properties = torch.cuda.get_device_properties(device)
            name = properties.name
            major, minor = torch.cuda.get_device_capability(device)
            about = (
                f"capability {major}.{minor}, {properties.multi_processor_count} multiprocessors, "
                f"{properties.total_memory / 2**30:.0f} GiB"
            )
        found.append(
            {
                "device": str(device),
                "name": name,
                "about": about,
                "auto": choice.resolve("auto", device),
            }
        )
    return found


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
