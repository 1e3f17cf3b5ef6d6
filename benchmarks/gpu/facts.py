"""The machine that is checked: what it is, and what is installed on it."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..machine import machine
from . import peers
from .sources import sources

_ROOT = Path(__file__).parents[2]
_SMI = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]


def facts(device: torch.device) -> dict[str, Any]:
    """Return where and with what the check runs, as JSON holds it."""
    host = machine()
    found = {
        "device": host["cpu"],
        "host": host["cpu"],
        "cores": os.cpu_count(),
        "driver": None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "steppo_kernels": host["steppo_kernels"],
        "peers": peers.versions(),
        "sources": sources(_ROOT),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        seen = torch.cuda.get_device_properties(device)
        found |= {
            "device": seen.name,
            "driver": _driver(device),
            "capability": f"{seen.major}.{seen.minor}",
            "multiprocessors": seen.multi_processor_count,
            "memory_gib": round(seen.total_memory / 2**30, 1),
            "l2_mib": round(seen.L2_cache_size / 2**20, 1),
        }
    return found


def headline(found: dict[str, Any]) -> str:
    """Return the facts in a line."""
    of_device = ""
    if found["driver"] is not None or "capability" in found:
        of_device = (
            f", capability {found['capability']}, {found['multiprocessors']} multiprocessors, "
            f"{found['memory_gib']} GiB, L2 of {found['l2_mib']} MiB; driver {found['driver']}"
        )
    installed = "".join(f", {name} {number}" for name, number in found["peers"].items())
    commit = found.get("sources", {}).get("git")
    of_sources = f" of {commit}" if commit else ""
    return (
        f"{found['device']}{of_device}; host {found['host']}, {found['cores']} cores; CUDA "
        f"{found['cuda']}, torch {found['torch']}, Triton {found['triton']}, Python "
        f"{found['python']}, steppo_kernels {found['steppo_kernels']}{of_sources}{installed}; "
        f"{found['date']}"
    )


def slug(name: str) -> str:
    """Return the name of a device as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def architecture(device: torch.device) -> str:
    """Return the number that nvcc knows a GPU by, such as 90."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}"


def version(project: str) -> str | None:
    """Return the version of an installed project, or None."""
    try:
        return metadata.version(project)
    except metadata.PackageNotFoundError:
        return None


def is_there(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def toolkit_program(name: str) -> str | None:
    """Return the path of a program of the CUDA toolkit: on PATH, in CUDA_HOME, or where it lies."""
    homes = [os.environ.get(variable, "") for variable in ("CUDA_HOME", "CUDA_PATH")]
    usual = sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    folders = [Path(home) for home in homes if home] + usual
    path = os.pathsep.join([os.environ.get("PATH", ""), *(str(one / "bin") for one in folders)])
    return shutil.which(name, path=path)


def _driver(device: torch.device) -> str | None:
    if shutil.which(_SMI[0]) is None:
        return None
    words = [*_SMI, f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"]
    for asked in (words, _SMI):
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    return None
