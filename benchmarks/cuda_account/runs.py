"""What `make gpu-check` measured on a GPU of the targets, where that was kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from ..gpu.report import NAME
from ..gpu.results import Results
from ..gpu.targets import is_for

_RESULTS = Path(__file__).parents[1] / "results"


class Run(NamedTuple):
    """A run.

    Attributes:
        when: the date and the hour.
        device: the GPU, its driver, and what ran on it.
        results: the rows.
    """

    when: str
    device: str
    results: Results


def runs() -> list[Run]:
    """Return the runs, the latest first."""
    found = []
    for path in _RESULTS.rglob(f"{NAME}.json"):
        document = json.loads(path.read_text())
        machine = document["machine"]
        if is_for(machine["device"]):
            device = (
                f"{machine['device']}, driver {machine['driver']}, CUDA {machine['cuda']}, "
                f"torch {machine['torch']}"
            )
            found.append(Run(machine["date"], device, Results(document)))
    return sorted(found, key=lambda run: run.when, reverse=True)
