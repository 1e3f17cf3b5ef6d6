"""Where a call of compiled code runs: the record ``Place`` of csrc/include/steppo/records.inc."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Place = tuple[int, int, int, int]


class _OfGraph(tuple[int, int, int, int]):
    """A place that keeps its workspace for as long as a call has it."""

    workspace: Tensor


def on_threads(_: Tensor) -> Place:
    """Return the place of CPU kernels: as many threads as torch takes."""
    return (torch.get_num_threads(), 0, 0, 0)


class Streams(threading.local):
    """Places of CUDA kernels: the current stream of a tensor's device, and a workspace.

    What the launches of a call leave for the next is in the workspace. A stream keeps the order of
    those, but not of calls that several threads make at a time: each thread has its own. A graph
    may be replayed beside other work, and so a launch that is captured gets one from the memory of
    the graph, which is the graph's again when the call ends.
    """

    def __init__(self, kernels: Any) -> None:
        """Take the module of the kernels. Every thread calls this when it comes here first."""
        self._kernels = kernels
        self._stream_of = _no_stream if kernels.on_host else torch._C._cuda_getCurrentRawStream
        self._loaded: set[int] = set()
        self._kept: dict[tuple[int, int], tuple[Tensor, Place]] = {}

    def __call__(self, like: Tensor) -> Place:
        """Return the place of a call on the device of a tensor."""
        device = like.get_device()
        stream = self._stream_of(device)
        if stream and self._kernels.is_capturing(stream):
            self._load(device)
            workspace, place = self._made(like.device, stream)
            of_graph = _OfGraph(place)
            of_graph.workspace = workspace
            return of_graph
        try:
            return self._kept[device, stream][1]
        except KeyError:
            self._load(device)
            self._kept[device, stream] = made = self._made(like.device, stream)
            return made[1]

    def _load(self, device: int) -> None:
        if device not in self._loaded:
            self._kernels.load(device)
            self._loaded.add(device)

    def _made(self, device: torch.device, stream: int) -> tuple[Tensor, Place]:
        """Return a workspace whose counters are 0, and the place that has it."""
        counters, size = self._kernels.workspace
        # It outlives the modes that are on.
        with torch.inference_mode(False), _disable_current_modes():
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
            workspace[:counters].zero_()
        return workspace, (0, workspace.data_ptr(), device.index or 0, stream)


def _no_stream(_: int) -> int:
    return 0
