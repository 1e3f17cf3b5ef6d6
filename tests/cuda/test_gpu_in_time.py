"""The tests stage of `make gpu-check`: its order, its end, and a device that is lost on the way."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import in_time, tally
from benchmarks.gpu.tally import NO_TIME, Tally

ROOT = Path(__file__).parents[2]
XDIST = ("-n", "1", "--dist=load", "--maxschedchunk=8")
WAYS = [pytest.param((), id="one process"), pytest.param(XDIST, id="xdist")]


def run(
    tests: str, folder: Path, *words: str, seconds: float = 60, conftest: str = ""
) -> tuple[int, dict[str, Any], str]:
    """Return the exit code of pytest with the plugin, its counts and its output."""
    (folder / "test_some.py").write_text(tests)
    (folder / "conftest.py").write_text(conftest)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = ["pytest", "-c", str(folder / "pytest.ini"), "--rootdir", str(folder)]
    command += ["-p", "benchmarks.gpu.in_time", f"--in-time={seconds}", "-p", "no:cacheprovider"]
    command += [f"--counts={folder / 'counts.json'}", "--continue-on-collection-errors", *words]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (folder / "counts.json").exists(), done.stdout + done.stderr
    return done.returncode, json.loads((folder / "counts.json").read_text()), done.stdout


def numbers(found: dict[str, Any]) -> tuple[int, ...]:
    return tuple(found[kind] for kind in ("passed", "failed", "skipped", "not_begun"))


ROUNDS = """
import pytest
order = []

@pytest.mark.parametrize("k", range(3))
def test_many(k):
    order.append(("many", k))

def test_one():
    order.append("one")

def test_last():
    assert order == [("many", 0), "one", ("many", 1), ("many", 2)], order
"""


def test_tests_run_in_rounds(tmp_path: Path) -> None:
    """`test_last` comes before the second case of `test_many`, and so it fails."""
    code, found, said = run(ROUNDS, tmp_path)
    assert (code, numbers(found)) == (1, (4, 1, 0, 0)), said
    (failure,) = found["failures"]
    assert (failure["count"], failure["tests"]) == (1, ["test_some.py::test_last"])
    assert failure["why"].startswith("AssertionError: [('many', 0), 'one']")


DRAWN = """
import pytest
order = []

@pytest.mark.parametrize("k", range(40))
def test_many(k):
    order.append(k)

def test_one():
    order.append("one")

def test_last():
    assert False, order[:2]

@pytest.mark.parametrize("k", range(40))
def test_others(k):
    pass
"""


@pytest.mark.parametrize("words", WAYS)
def test_cases_are_drawn(words: tuple[str, ...], tmp_path: Path) -> None:
    """A first case of each function comes first, which is another one for another number."""
    firsts = []
    for draw in ("1", "2", "1"):
        code, found, said = run(DRAWN, tmp_path, f"--draw={draw}", *words)
        assert (code, numbers(found)) == (1, (81, 1, 0, 0)), said
        (failure,) = found["failures"]
        firsts.append(failure["why"])
        assert "'one']" in firsts[-1]
    assert firsts[0] == firsts[2] != firsts[1]


SLOW = """
import time
import pytest

def test_first():
    pass

@pytest.mark.parametrize("k", range(4000))
def test_many(k):
    time.sleep(0.5)
"""


@pytest.mark.parametrize("words", WAYS)
def test_the_session_ends_when_the_time_is_up(words: tuple[str, ...], tmp_path: Path) -> None:
    """It says how many tests were not begun, and that is no failure."""
    code, found, said = run(SLOW, tmp_path, *words, seconds=12)
    passed, failed, skipped, not_begun = numbers(found)
    assert code == 0, said
    assert 0 < passed < 100
    assert (failed, skipped, not_begun) == (0, 0, 4001 - passed)
    assert (found["ended"], found["failures"]) == (NO_TIME, [])
    # Nothing is set up to be skipped, and pytest's own summary is there.
    assert "skipped" not in said
    assert f"{passed} passed" in said


def test_no_time_at_all_is_a_failure(tmp_path: Path) -> None:
    code, found, said = run(ROUNDS, tmp_path, seconds=0)
    assert (code, numbers(found)) == (1, (0, 0, 0, 5)), said


def test_a_failure_is_one_though_the_time_is_up(tmp_path: Path) -> None:
    tests = "def test_it(): assert False\n" + SLOW
    code, found, said = run(tests, tmp_path, seconds=10)
    assert (code, found["failed"], found["ended"]) == (1, 1, NO_TIME), said


HANGS = """
import ctypes
import time
import pytest

def test_hangs():
    # It keeps the interpreter from everything else.
    ctypes.PyDLL(None).sleep(3000)

@pytest.mark.parametrize("k", range(4000))
def test_many(k):
    time.sleep(0.1)
"""


@pytest.mark.parametrize("words", [(), ("-n", "2", *XDIST[2:])], ids=["one process", "xdist"])
def test_a_test_that_does_not_end_is_broken_off(words: tuple[str, ...], tmp_path: Path) -> None:
    """The session waits for it, but not for long, and all others count."""
    code, found, said = run(HANGS, tmp_path, *words, "--grace=2", seconds=15)
    passed, failed, skipped, not_begun = numbers(found)
    assert code == (0 if words else 1), said
    assert (passed > 0) == bool(words)
    assert (failed, skipped, not_begun) == (0, 0, 4000 - passed)
    assert (found["ended"], found["failures"]) == (NO_TIME, [])
    ((name, seconds),) = found["broken_off"].items()
    assert name == "test_some.py::test_hangs"
    assert 2 < seconds < 60


def test_a_test_that_was_begun_in_time_may_end_after_it(tmp_path: Path) -> None:
    tests = "import time\ndef test_it(): time.sleep(12)\ndef test_other(): pass\n"
    code, found, said = run(tests, tmp_path, seconds=10)
    assert (code, numbers(found)) == (0, (1, 0, 0, 1)), said
    assert found["broken_off"] == {}


def test_what_comes_before_the_first_test_takes_of_its_time(tmp_path: Path) -> None:
    """A conftest.py that imports slowly leaves less time for tests."""
    conftest = "import time; time.sleep(5)\n"
    _, found, said = run("def test_it(): pass\n", tmp_path, seconds=4, conftest=conftest)
    assert (numbers(found), found["first_after"]) == ((0, 0, 0, 1), None), said


def test_a_test_that_is_broken_off_after_long_is_a_failure(tmp_path: Path) -> None:
    subject, now = Tally(tmp_path / "counts.json"), time.time()
    for name, outcome, begin in (("a", "", 80), ("b", "", 70), ("c", "passed", 80)):
        subject.pytest_runtest_logstart(name)
        subject._running[name] = now - begin
        if outcome:
            report = pytest.TestReport(name, ("", 0, ""), {}, outcome, None, "call")  # type: ignore[arg-type]
            subject.pytest_runtest_logreport(report)
    subject.pytest_runtest_logstart("d")
    subject.pytest_runtest_logfinish("d")
    subject.break_off()
    found = json.loads((tmp_path / "counts.json").read_text())
    assert numbers(found)[:3] == (0, 2, 0)
    assert found["broken_off"].keys() == {"a", "b", "c"}
    (failure,) = found["failures"]
    assert (failure["why"], failure["tests"]) == ("it had not ended after 75 s", ["a", "c"])


# In a process where a test has lost the device, no other passes.
LOSES = """
import os
import device
import pytest

@pytest.mark.parametrize("k", range(12))
def test_some(k):
    if device.is_lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if k == 3:
        device.is_lost = True
        raise RuntimeError("CUDA error: the first of them\\nCUDA kernel errors might be reported")
    assert k != 5
    if k == 7:
        os.abort()
"""
DEVICE = """
import sys, types
from benchmarks.gpu import in_time
device = sys.modules["device"] = types.ModuleType("device")
device.is_lost = False
in_time.device_answers = lambda: not device.is_lost
"""


def test_a_worker_that_has_lost_the_device_or_crashed_is_replaced(tmp_path: Path) -> None:
    """The crash is put down to the test that lost it, which counts once, and all others run."""
    code, found, said = run(LOSES, tmp_path, *XDIST, conftest=DEVICE)
    assert "replacing crashed worker" in said
    assert (code, numbers(found)) == (1, (9, 3, 0, 0)), said
    assert found["lost_by"] == ["test_some.py::test_some[3]"]
    # A new process knows nothing of the one before.
    assert {one["why"]: one["tests"] for one in found["failures"]} == {
        "RuntimeError: CUDA error: the first of them": ["test_some.py::test_some[3]"],
        "assert 5 != 5": ["test_some.py::test_some[5]"],
        "the process ended": ["test_some.py::test_some[7]"],
    }


def test_without_xdist_a_lost_device_ends_the_session(tmp_path: Path) -> None:
    code, found, said = run(LOSES, tmp_path, conftest=DEVICE)
    assert (code, numbers(found)) == (2, (3, 1, 0, 8)), said
    assert found["ended"] == "the device was lost by test_some.py::test_some[3]"
    assert found["ended"] in said


@pytest.mark.parametrize("words", WAYS)
def test_a_file_that_cannot_be_imported_is_one_failure(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    code, found, said = run("def test_good(): pass\n", tmp_path, *words)
    assert (code, numbers(found)) == (1, (1, 1, 0, 0)), said
    (failure,) = found["failures"]
    assert failure["why"] == "ModuleNotFoundError: No module named 'no_such_module'"


def test_a_test_that_fails_twice_is_one(tmp_path: Path) -> None:
    tests = """
        import pytest

        @pytest.fixture
        def it():
            yield
            raise ValueError("afterwards")

        def test_passes(it): pass

        def test_fails(it): raise KeyError("before")
    """
    code, found, said = run("\n".join(line[8:] for line in tests.splitlines()), tmp_path)
    assert (code, numbers(found)) == (1, (0, 2, 0, 0)), said
    whys = [failure["why"] for failure in found["failures"]]
    assert whys == ["ValueError: afterwards", "KeyError: 'before'"]


def test_many_failures_make_no_large_file(tmp_path: Path) -> None:
    subject = Tally(tmp_path / "counts.json")
    reasons = tally._REASONS + 2
    for number in range(10 * reasons):
        why = f"ValueError: reason {number % reasons}"
        subject.pytest_runtest_logreport(
            pytest.TestReport(f"test_{number}", ("", 0, ""), {}, "failed", why, "call")
        )
    found = json.loads((tmp_path / "counts.json").read_text())
    assert found["failed"] == 10 * reasons == sum(one["count"] for one in found["failures"])
    assert len(found["failures"]) == tally._REASONS + 1
    assert found["failures"][-1]["count"] == 20
    assert all(len(one["tests"]) == tally._NAMED for one in found["failures"])


def test_a_device_that_was_not_used_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("torch.cuda.synchronize", lost)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    assert in_time.device_answers()
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    assert not in_time.device_answers()
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    assert in_time.device_answers()
