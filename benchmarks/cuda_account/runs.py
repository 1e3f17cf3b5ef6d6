"""What `make gpu-check` measured, where that was kept: on a GPU of the targets, and on others."""

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
        gpu: its name.
        device: the GPU, its driver, and what ran on it.
        results: the rows.
    """

    when: str
    gpu: str
    device: str
    results: Results


def runs() -> tuple[list[Run], list[Run]]:
    """Return the runs on the GPU of the targets and those on others, the latest first."""
    found = []
    for path in _RESULTS.rglob(f"{NAME}.json"):
        document = json.loads(path.read_text())
        machine = document["machine"]
        device = (
            f"{machine['device']}, driver {machine['driver']}, CUDA {machine['cuda']}, "
            f"torch {machine['torch']}"
        )
        found.append(Run(machine["date"], machine["device"], device, Results(document)))
    found.sort(key=lambda run: run.when, reverse=True)
    return [run for run in found if is_for(run.gpu)], [run for run in found if not is_for(run.gpu)]
