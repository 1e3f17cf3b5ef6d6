"""Real processes that form a process group (gloo), kept for all tests of a session."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

# What a rank waits for the others, and a test for the ranks (they import torch first), in seconds.
_PATIENCE, _LIMIT = 60, 180


def is_possible() -> bool:
    """Return whether this torch has what the tests need."""
    return distributed.is_available() and distributed.is_gloo_available()


def spawn(run: Callable[[int, str], None], folder: Path, size: int) -> None:
    """Run a function of the rank and of where the ranks meet in processes of their own."""
    if not is_possible():
        pytest.skip("this torch has no gloo")
    ranks = torch.multiprocessing.spawn(run, (str(folder / "rendezvous"),), nprocs=size, join=False)
    deadline = time.monotonic() + _LIMIT
    try:
        while not ranks.join(timeout=5):
            assert time.monotonic() < deadline, "the ranks take too long"
    finally:
        for process in ranks.processes:
            process.kill()


def _serve(rank: int, size: int, rendezvous: str, pipe: Connection) -> None:
    """Run what comes through the pipe on this rank, until None comes."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=_PATIENCE),
    )
    while (task := pipe.recv()) is not None:
        run, arguments = task
        try:
            answer = (True, run(rank, size, *arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
    # Not through Python's own exit, in which a thread of gloo now and again ends the process.
    os._exit(0)


def _context() -> multiprocessing.context.BaseContext:
    """Return what starts processes: from one that has imported what takes seconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # What is not installed is left out.
    context.set_forkserver_preload(
        [
            "torch.distributed.fsdp",
            "torch.distributed.tensor.parallel",
            "transformers.models.llama.modeling_llama",
            "steppo_kernels.integrations.transformers",
        ]
    )
    return context


class World:
    """Ranks that run functions together."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        context = _context()
        rendezvous = str(Path(self._folder.name) / "rendezvous")
        self._pipes, self._ranks = [], []
        for rank in range(size):
            pipe, end = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, rendezvous, end), daemon=True
            )
            process.start()
            self._pipes.append(pipe)
            self._ranks.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what ``function(rank, size, *arguments)`` returns on each rank.

        The function is one of a module, and what goes in and out can be pickled.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(_LIMIT), f"rank {rank} takes too long"
            answers.append(pipe.recv())
        failed = [
            f"rank {r}: {answer}" for r, (is_good, answer) in enumerate(answers) if not is_good
        ]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def end(self) -> None:
        """End the processes."""
        for process in self._ranks:
            process.kill()
            process.join()
        self._folder.cleanup()


class Worlds:
    """The worlds of a session by size, each made when it is first asked for."""

    def __init__(self) -> None:
        self._made: dict[int, World] = {}

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run a function on so many ranks; after a failure these are made anew."""
        world = self._made.get(size) or self._made.setdefault(size, World(size))
        try:
            return world.run(function, *arguments)
        except BaseException:
            # The ranks may wait for each other.
            self._made.pop(size).end()
            raise

    def end(self) -> None:
        """End all of them."""
        for world in self._made.values():
            world.end()
        self._made.clear()
