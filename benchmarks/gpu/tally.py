"""What became of tests, in a file that is renewed after every test.

A run that is stopped leaves what it saw. The file is small, however many tests fail.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

NO_TIME = "no time was left"
# A test that has run for so many seconds when it is broken off hangs, and fails.
HANGS = 75.0
# So many reasons are kept, and so many tests are named for one; all are counted.
_REASONS, _NAMED = 40, 8
_LONGEST = 200
_OTHERS = "other reasons, which the log tells"


class Tally:
    """A plugin of pytest that counts tests, and keeps why they failed."""

    def __init__(self, path: Path, started: float | None = None) -> None:
        """Take the file for the counts, and the time at which the process began."""
        self._path = path
        self._started = time.time() if started is None else started
        self._first_after: float | None = None
        self._running: dict[str, float] = {}
        self._broken_off: dict[str, float] = {}
        self._collected = 0
        self._outcomes: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._broken: set[str] = set()
        self._lost_by: list[str] = []
        self._failures: dict[str, dict[str, Any]] = {}
        self._ended = ""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Take the number of tests, without xdist."""
        self._collected = len(session.items)
        self._write()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        """Take the number of tests, which is the same in every worker."""
        self._collected = len(ids)
        self._write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Count a file that cannot be imported, once for all processes."""
        if report.failed and report.nodeid not in self._broken:
            self._broken.add(report.nodeid)
            self._fail(report.nodeid, report.longrepr)
            self._write()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Take note of a test that begins, here or in a worker of xdist."""
        self._running[nodeid] = time.time()
        if self._first_after is None:
            self._first_after = self._running[nodeid] - self._started

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Take note of a test that has ended."""
        self._running.pop(nodeid, None)

    def break_off(self) -> None:
        """Name the tests that still run: the session ends without them."""
        self._ended = NO_TIME
        for nodeid, begin in self._running.items():
            self._broken_off[nodeid] = time.time() - begin
            if self._broken_off[nodeid] >= HANGS:
                self._settle(nodeid, "failed", f"it had not ended after {HANGS:.0f} s")
        self._write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once, however many of its stages fail."""
        if report.when != "call" and report.outcome == "passed":
            return
        is_crash = report.when not in ("setup", "call", "teardown")
        why = "the process ended" if is_crash else report.longrepr
        is_new = self._settle(report.nodeid, report.outcome, why)
        if is_crash:
            self._running.pop(report.nodeid, None)
            if not is_new:
                # The worker ended after it had said that the test failed.
                self._lost_by.append(report.nodeid)
        self._write()

    def _settle(self, nodeid: str, outcome: str, why: object) -> bool:
        """Count the outcome of a test; return whether it had not failed before."""
        before = self._outcomes.get(nodeid)
        if before == "failed":
            return False
        if before is not None:
            self._counts[before] -= 1
        self._counts[outcome] += 1
        self._outcomes[nodeid] = outcome
        if outcome == "failed":
            self._fail(nodeid, why)
        return True

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Take the reason why the session ends before its tests do."""
        self._ended = str(excinfo.value)
        # What follows waits for the workers of xdist, and may be stopped before it is over.
        self._write()

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Say by the exit code what became of the tests that there was time for."""
        if self._ended == NO_TIME:
            is_bad = self._failures or not self._outcomes
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if is_bad else pytest.ExitCode.OK
        self._write()

    def _fail(self, nodeid: str, longrepr: object) -> None:
        why = _reason(longrepr)
        if why not in self._failures and len(self._failures) >= _REASONS:
            why = _OTHERS
        found = self._failures.setdefault(why, {"why": why, "count": 0, "tests": []})
        found["count"] += 1
        if len(found["tests"]) < _NAMED:
            found["tests"].append(nodeid)

    def _write(self) -> None:
        found = {
            "passed": self._counts["passed"],
            "failed": self._counts["failed"] + len(self._broken),
            "skipped": self._counts["skipped"],
            "not_begun": self._collected - len(self._outcomes.keys() | self._broken_off.keys()),
            "broken_off": {nodeid: round(s, 1) for nodeid, s in self._broken_off.items()},
            "first_after": self._first_after,
            "ended": self._ended,
            "lost_by": self._lost_by,
            "failures": list(self._failures.values()),
        }
        # Whoever stops the run finds this file or the one before, and no half of one.
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(found))
        new.replace(self._path)


def _reason(longrepr: object) -> str:
    """Return what pytest calls the crash message: an error in a line."""
    crash = getattr(longrepr, "reprcrash", None)
    # Of an exception the first line names it. Of a text, the last is what all the rest led to.
    lines = (crash.message if crash else str(longrepr)).splitlines()
    said = [text for line in lines if (text := line.removeprefix("E ").strip())]
    return (said[0 if crash else -1] if said else "no message")[:_LONGEST]
