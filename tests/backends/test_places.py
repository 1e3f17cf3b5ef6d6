"""Where calls of CUDA kernels run: streams, threads and captures, all of them made up here."""

from __future__ import annotations

import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from steppo_kernels.backends.compiled.place import Streams

_COUNTERS, _SIZE = 16, 64


class _Machine:
    """Stands in for a GPU and the module of its kernels."""

    def __init__(self) -> None:
        self.stream = 7
        self.captured: set[int] = set()
        self.loaded: list[int] = []
        kernels = SimpleNamespace(
            on_host=True,
            workspace=(_COUNTERS, _SIZE),
            is_capturing=self._is_capturing,
            load=self.loaded.append,
        )
        self.places = Streams(kernels)

    def _is_capturing(self, stream: int) -> bool:
        assert stream != 0, "no capture is on the default stream, and a question spoils others"
        return stream in self.captured

    def place(self):
        """Return the place of a call on the current stream."""
        self.places._stream_of = lambda _: self.stream
        return self.places(torch.empty(3))


@pytest.fixture
def machine():
    return _Machine()


def test_a_stream_keeps_its_workspace(machine):
    first = machine.place()
    assert first[3] == 7
    assert machine.place() is first
    machine.stream = 8
    other = machine.place()
    assert other[3] == 8
    assert other[1] != first[1]
    machine.stream = 7
    assert machine.place() is first


def test_kernels_are_loaded_once_a_device_and_before_a_capture(machine):
    machine.captured = {7}
    machine.place()
    machine.place()
    machine.captured = set()
    machine.place()
    assert machine.loaded == [-1]


def test_threads_share_no_workspace(machine):
    here, there = machine.place(), []
    other = threading.Thread(target=lambda: there.append(machine.place()))
    other.start()
    other.join()
    assert there[0][3] == here[3]
    assert there[0][1] != here[1]


def test_a_capture_has_a_workspace_for_each_launch(machine):
    outside = machine.place()
    machine.captured = {7}
    first, second = machine.place(), machine.place()
    assert len({outside[1], first[1], second[1]}) == 3
    assert first[3] == 7
    # The graph's memory is the graph's again when the call ends, and not before.
    workspace = weakref.ref(first.workspace)
    assert workspace() is not None
    assert first[1] == first.workspace.data_ptr()
    del first
    assert workspace() is None
    machine.captured = set()
    assert machine.place() is outside


def test_the_default_stream_is_not_asked_for_a_capture(machine):
    machine.stream = 0
    assert machine.place()[3] == 0


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode, torch.no_grad])
def test_a_workspace_outlives_the_mode_it_is_made_in(machine, mode, captured):
    machine.captured = {7} if captured else set()
    like = torch.empty(3)
    machine.places._stream_of = lambda _: 7
    with mode():
        place = machine.places(like)
    workspace = place.workspace if captured else machine.places._kept[-1, 7][0]
    assert type(workspace) is torch.Tensor
    assert not workspace.is_inference()
    assert workspace.numel() == _SIZE
    assert not workspace[:_COUNTERS].any()
    assert place[1] == workspace.data_ptr() != 0
