"""A plugin of pytest: as many tests as there is time for, of every kind some.

``python -m pytest -p benchmarks.gpu.in_time --in-time 120 --counts counts.json``

Tests are put in rounds. The first has one case of every test function on every backend, the second
a second one, and so on. When the time is up, the rest is skipped. Counts are written after every
test: a run that is stopped shows what it saw.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

_END = "STEPPO_TESTS_UNTIL"
_NO_TIME = "no time was left"
_KINDS = ("passed", "failed", "skipped", "no_time")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the time, and where counts go."""
    group = parser.getgroup("in time")
    group.addoption("--in-time", type=float, help="seconds after which no test is begun")
    group.addoption("--counts", type=Path, help="file for the counts, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Set the end once, for all processes: those of xdist are started later."""
    if not _is_worker():
        os.environ[_END] = str(time.time() + config.getoption("--in-time"))
        config.pluginmanager.register(_Counts(config.getoption("--counts")))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put items in rounds."""
    seen: Counter[tuple[str, str]] = Counter()
    rounds = []
    for place, item in enumerate(items):
        kind = (item.nodeid.partition("[")[0], _backend(item))
        rounds.append((seen[kind], place, item))
        seen[kind] += 1
    items[:] = [item for *_, item in sorted(rounds, key=lambda one: one[:2])]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what comes too late, before fixtures are made."""
    if time.time() > float(os.environ[_END]):
        pytest.skip(_NO_TIME)


def _backend(item: pytest.Item) -> str:
    """Return the backend that an item is about, "" if it names none."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return next((str(value.backend) for value in values if hasattr(value, "backend")), "")


def _is_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ


class _Counts:
    """What became of the tests, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts: dict[str, Any] = dict.fromkeys(_KINDS, 0) | {"failures": []}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once: where it is called, or where it fails or is skipped before."""
        if report.when != "call" and report.outcome == "passed":
            return
        kind = str(report.outcome)
        if kind == "skipped" and _NO_TIME in str(report.longrepr):
            kind = "no_time"
        self._count(kind, report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Count a file that cannot be imported, once for all processes."""
        if report.failed and report.nodeid not in self._counts["failures"]:
            self._count("failed", report.nodeid)

    def _count(self, kind: str, nodeid: str) -> None:
        self._counts[kind] += 1
        if kind == "failed":
            self._counts["failures"].append(nodeid)
        self._path.write_text(json.dumps(self._counts))
