"""Where a call of compiled code runs: the record ``Place`` of csrc/include/steppo/records.inc."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

Place = tuple[int, int, int, int]


def on_threads(_: Tensor) -> Place:
    """Return the place of CPU kernels: as many threads as torch takes."""
    return (torch.get_num_threads(), 0, 0, 0)


class Streams(threading.local):
    """Places of CUDA kernels: the current stream of a tensor's device, and a workspace.

    What the launches of a call leave for the next is in the workspace. A stream keeps the order of
    those, but not of calls that several threads make at a time: each thread has its own. A graph
    may be replayed beside other work, and so a launch that is captured gets one from the memory of
    the graph.
    """

    def __init__(self, kernels: Any) -> None:
        """Take the module of the kernels. Every thread calls this when it comes here first."""
        self._kernels = kernels
        self._stream_of = _no_stream if kernels.on_host else torch._C._cuda_getCurrentRawStream
        self._loaded: set[int] = set()
        self._kept: dict[tuple[int, int], tuple[Tensor, Place]] = {}
        self._captured: Tensor | None = None

    def __call__(self, like: Tensor) -> Place:
        """Return the place of a call on the device of a tensor."""
        device = like.get_device()
        stream = self._stream_of(device)
        if stream and self._kernels.is_capturing(stream):
            self._load(device)
            self._captured, place = self._made(like.device, stream)
            return place
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
        with torch.inference_mode(False):
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
            workspace[:counters].zero_()
        return workspace, (0, workspace.data_ptr(), device.index or 0, stream)


def _no_stream(_: int) -> int:
    return 0
