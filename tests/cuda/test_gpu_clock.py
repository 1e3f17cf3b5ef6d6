"""The clock of `make gpu-check` on a GPU that is not there: what happens in which order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import clock
from benchmarks.gpu.clock import DeviceClock, Launches, Turn

CPU = torch.device("cpu")
CACHE = 4096


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done, by a `torch.cuda` whose events are a second apart for each call."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.calls = done.count("call")
            done.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 1000.0 * (end.calls - self.calls)

    class Profile:
        def __init__(self, activities: list[Any]) -> None:
            assert [activity.name for activity in activities] == ["CUDA"]

        def __enter__(self) -> Profile:
            done.append("profile")
            return self

        def __exit__(self, *_: object) -> None:
            done.append("end of profile")

        def events(self) -> list[Any]:
            span = SimpleNamespace(elapsed_us=lambda: 2.0)
            kind = torch.autograd.DeviceType.CUDA
            return [SimpleNamespace(name="a_kernel", device_type=kind, time_range=span)] * 3

    fakes = {
        "Event": Event,
        "synchronize": lambda device: done.append("wait"),
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=CACHE),
        "memory_allocated": lambda device: 100,
        "reset_peak_memory_stats": lambda device: done.append("forget the peak"),
        "max_memory_allocated": lambda device: 164,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(clock, "profile", Profile)
    flush = DeviceClock._flush

    def flushing(self: DeviceClock) -> None:
        done.append("flush")
        flush(self)

    monkeypatch.setattr(DeviceClock, "_flush", flushing)
    return done


@pytest.fixture
def gpu(log: list[str]) -> DeviceClock:
    found = DeviceClock(CPU)
    # As if a flush took a millisecond.
    found._one_flush = 1e-3
    log.clear()
    return found


def test_more_than_the_cache_is_flushed(gpu: DeviceClock) -> None:
    assert gpu._flushed.nbytes == 3 * CACHE


def test_the_device_is_timed_behind_a_flush(gpu: DeviceClock, log: list[str]) -> None:
    found = gpu.turn(lambda: log.append("call"), lambda: log.append("reset"))
    assert found.device == 1.0
    steps = " ".join(log)
    # The first call tells how long one takes.
    assert steps.startswith("reset wait call wait wait reset flush")
    assert "reset flush flush event call event wait" in steps
    assert "flush call" not in steps
    # The host is timed alone where inputs are restored.
    assert steps.endswith("reset wait call wait")


def test_short_calls_are_waited_for_together(gpu: DeviceClock, log: list[str]) -> None:
    found = gpu.turn(lambda: log.append("call"), None)
    assert isinstance(found, Turn)
    assert found.wall < 1e-3
    assert "call call call" in " ".join(log)


def test_a_long_call_is_hidden_behind_no_more_than_a_while(
    gpu: DeviceClock, log: list[str]
) -> None:
    gpu._timed(lambda: log.append("call"), None, once=5.0, rounds=1)
    # 20 ms of flushes, and one more.
    assert log.count("flush") == 21


def test_a_rate_is_that_of_the_fastest_call(gpu: DeviceClock, log: list[str]) -> None:
    assert gpu.rate(lambda: log.append("call"), 12.0) == 12.0


def test_launches_are_those_of_the_call(gpu: DeviceClock, log: list[str]) -> None:
    found = gpu.launches(lambda: log.append("call"), lambda: log.append("reset"))
    assert found == Launches(3, pytest.approx(6e-6), 0)
    assert "reset flush wait profile call wait end of profile" in " ".join(log)


def test_no_launches_are_not_zero_launches(
    gpu: DeviceClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profiler that may not look at the device sees nothing."""
    monkeypatch.setattr(clock, "counted", lambda events: Launches(0, 0.0, 0))
    assert gpu.launches(lambda: None, None) is None


def test_the_peak_is_that_of_the_call(gpu: DeviceClock, log: list[str]) -> None:
    assert gpu.peak(lambda: log.append("call"), lambda: log.append("reset")) == 64
    assert log == ["reset", "wait", "forget the peak", "call", "wait"]
