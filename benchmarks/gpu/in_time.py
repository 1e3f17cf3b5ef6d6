"""A plugin of pytest: as many tests as there is time for, of every kind some.

``python -m pytest -p benchmarks.gpu.in_time --in-time 120 --counts counts.json``

Tests are put in rounds. The first has one case of every test function on every backend, the second
a second one, and so on. `--draw 7` draws which case comes first, so that runs which end before
their tests do begin others.

When the time is up, no test is begun. The time counts from the start of the process: importing and
collecting are in it. Tests that run then may end within `--grace` seconds. After that the session
breaks them off and ends with its counts, because one test that compiles can take longer than all
the rest of them. A test that was broken off is named. It fails if it ran for so long that it hangs.

A kernel that goes astray leaves a GPU that answers nothing more in its process, and every later
test would fail for that reason. After a test that failed the device is therefore asked. A worker of
xdist whose device is lost ends before it says that the test is done: xdist then puts the crash down
to that test, and starts another worker for the rest. Without xdist the session ends.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

from .tally import NO_TIME, Tally

# The plugin is loaded before any conftest.py, whose imports may take long.
_STARTED = time.time()
_END = "STEPPO_TESTS_UNTIL"
# The exit code of a worker whose device is lost. xdist looks at none.
_LOST = 3
# A worker ends itself so much later than the session breaks off, which then waits for no worker.
_LATER = 1.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the time, and where counts go."""
    group = parser.getgroup("in time")
    group.addoption("--in-time", type=float, help="seconds after which no test is begun")
    group.addoption("--grace", type=float, default=30.0, help="seconds that the last have then")
    group.addoption("--counts", type=Path, help="file for the counts, as JSON")
    group.addoption("--draw", type=int, help="draw the order of cases by this number")


def pytest_configure(config: pytest.Config) -> None:
    """Set the end once, for all processes: those of xdist are started later."""
    is_worker = hasattr(config, "workerinput")
    grace = config.getoption("--grace")
    if is_worker:
        # The signal ends the process also where a test hangs outside of Python.
        config.pluginmanager.register(_Alarm(grace + _LATER))
    else:
        os.environ[_END] = str(_STARTED + config.getoption("--in-time"))
        tally = Tally(config.getoption("--counts"), _STARTED)
        config.pluginmanager.register(tally)
        signal.signal(signal.SIGALRM, lambda *_: _break_off(tally))
        config.pluginmanager.register(_Alarm(grace))
    config.pluginmanager.register(_Watch(is_worker))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put items in rounds."""
    seen: Counter[tuple[str, str]] = Counter()
    rounds = []
    seed = config.getoption("--draw")
    places = list(range(len(items)))
    if seed is not None:
        # Every process draws the same.
        random.Random(seed).shuffle(places)
    for place in places:
        item = items[place]
        kind = (item.nodeid.partition("[")[0], _backend(item))
        rounds.append((seen[kind], place, item))
        seen[kind] += 1
    items[:] = [item for *_, item in sorted(rounds, key=lambda one: one[:2])]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Begin nothing more when the time is up, in no process."""
    if not _is_late():
        return None
    item.session.shouldstop = NO_TIME
    return True


def device_answers() -> bool:
    """Return whether the GPU still does what it is told, in this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class _Alarm:
    """Sends SIGALRM so many seconds after the time is up, unless the session ends before."""

    def __init__(self, seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, max(_left() + seconds, 0.1))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Leave alone what ends by itself."""
        signal.setitimer(signal.ITIMER_REAL, 0)


def _break_off(tally: Tally) -> None:
    """Count the tests that run as broken off, and end the session as a user would."""
    tally.break_off()
    raise KeyboardInterrupt(NO_TIME)


class _Watch:
    """Asks the device after each test that failed."""

    def __init__(self, is_worker: bool) -> None:
        self._is_worker = is_worker
        self._has_failed = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Go on with the next test only if there is a device to run it."""
        self._has_failed = False
        result = yield
        if self._has_failed and not _is_late() and not device_answers():
            if self._is_worker:
                # Reports are written to a pipe as they are made: those of this test are out.
                os._exit(_LOST)
            item.session.shouldstop = f"the device was lost by {item.nodeid}"
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take note of what became of a test, of its setup and of its teardown."""
        self._has_failed |= report.failed


def _backend(item: pytest.Item) -> str:
    """Return the backend that an item is about, "" if it names none."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return next((str(value.backend) for value in values if hasattr(value, "backend")), "")


def _left() -> float:
    """Return the seconds until the time is up."""
    return float(os.environ[_END]) - time.time()


def _is_late() -> bool:
    return _left() < 0
