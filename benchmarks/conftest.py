"""What goes into the JSON: the machine and the medians, without the single rounds."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from .families import FAMILIES
from .machine import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run say which family it measures: its report reads that."""
    parser.addoption("--family", choices=FAMILIES, default=FAMILIES[0])


def pytest_report_header() -> str:
    """Say what is measured, and where."""
    return "  ".join(f"{key}: {value}" for key, value in machine().items())


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Keep what the report reads, and what tells one run from another."""
    family = config.getoption("--family")
    peers = importlib.import_module(f"{__package__}.{family}.peers").versions()
    output_json["machine_info"] = machine() | {"family": family, "peers": peers}
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
