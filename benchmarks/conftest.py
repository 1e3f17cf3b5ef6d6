"""What goes into the JSON: the machine and the medians, without the single rounds."""

from __future__ import annotations

from typing import Any

import pytest

from .machine import machine


def pytest_report_header() -> str:
    """Say what is measured, and where."""
    return "  ".join(f"{key}: {value}" for key, value in machine().items())


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Keep what the report reads, and what tells one run from another.

    The families add their name and the versions of their peers.
    """
    output_json["machine_info"] = machine()
    output_json["commit_info"] = {
        key: output_json["commit_info"].get(key) for key in ("id", "dirty", "time")
    }
    for entry in output_json["benchmarks"]:
        stats = entry["stats"]
        kept = {key: _short(stats[key]) for key in ("median", "min", "iqr", "rounds")}
        info = {key: _short(value) for key, value in entry["extra_info"].items()}
        name = entry["name"]
        entry.clear()
        entry.update(name=name, stats=kept, extra_info=info)


def _short(value: Any) -> Any:
    """Return a float with the digits that a timing has."""
    return float(f"{value:.5g}") if isinstance(value, float) else value
