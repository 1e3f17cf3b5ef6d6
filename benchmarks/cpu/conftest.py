"""Name the family and its peer in the JSON."""

from __future__ import annotations

from typing import Any

from . import peers


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Add to what `benchmarks.conftest` keeps."""
    output_json["machine_info"] |= {"family": "cpu", "peers": {"verl": peers.verl_version()}}
