"""Runs the commands of the check: each with a time limit, its output kept, side by side or not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PASSED, FAILED, SKIPPED, LATE = "passed", "FAILED", "skipped", "TOO LATE"
# What a command that is interrupted may take to say how far it came.
_LAST_WORDS = 10.0
_running: set[subprocess.Popen[bytes]] = set()


class Verdict(NamedTuple):
    """What became of a command, in a word and in a sentence."""

    word: str
    said: str


class Finished(NamedTuple):
    """A command that ended: its exit code, None if it was stopped, and where its output is."""

    code: int | None
    log: Path


def by_exit_code(done: Finished) -> Verdict:
    """Return what the exit code of a command says, and its last line."""
    return Verdict(FAILED if done.code else PASSED, last_line(done.log))


def last_line(log: Path) -> str:
    """Return the last line of an output that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


@dataclass(frozen=True)
class Task:
    """One command.

    Attributes:
        stage: what it belongs to.
        name: what the page calls it.
        words: the command.
        limit: seconds after which it is stopped.
        environment: variables beside those that are there.
        judge: says what became of a command that ended; one that was stopped is late.
        why_not: why it cannot run here; empty if it can.
    """

    stage: str
    name: str
    words: Sequence[str] = ()
    limit: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)
    judge: Callable[[Finished], Verdict] = by_exit_code
    why_not: str = ""


class Outcome(NamedTuple):
    """What the page says of a task."""

    name: str
    word: str
    seconds: float
    said: str

    @property
    def is_bad(self) -> bool:
        """Whether the check fails by this."""
        return self.word in (FAILED, LATE)


def side_by_side(tasks: Sequence[Task], root: Path, logs: Path) -> list[Outcome]:
    """Run tasks at the same time, in the folder `root`; return their outcomes in their order."""
    if not tasks:
        return []
    with ThreadPoolExecutor(len(tasks)) as pool:
        try:
            return list(pool.map(lambda task: _outcome(task, root, logs), tasks))
        except BaseException:
            # Whoever interrupts the check leaves nothing running.
            for process in list(_running):
                _end(process)
            raise


def log_of(task: Task, logs: Path) -> Path:
    """Return where the output of a task is kept."""
    return logs / f"{task.name.replace(' ', '_')}.txt"


def _outcome(task: Task, root: Path, logs: Path) -> Outcome:
    if task.why_not:
        print(f"{task.name}: skipped: {task.why_not}", flush=True)
        return Outcome(task.name, SKIPPED, 0.0, task.why_not)
    begin = time.monotonic()
    log = log_of(task, logs)
    try:
        done = Finished(_run(task, root, log), log)
    except OSError as error:
        word, said = FAILED, f"{task.words[0]}: {error.strerror}"
    else:
        word, said = task.judge(done)
        if done.code is None:
            word, said = LATE, f"stopped after {task.limit:.0f} s; {said}"
    seconds = time.monotonic() - begin
    print(f"{task.name}: {word} in {seconds:.0f} s: {said}", flush=True)
    return Outcome(task.name, word, seconds, said)


def _run(task: Task, root: Path, log: Path) -> int | None:
    """Return the exit code of a command, or None if it had to be stopped."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **task.environment}
    with log.open("w") as out:
        process = subprocess.Popen(
            task.words,
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _running.add(process)
        try:
            return process.wait(task.limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LAST_WORDS)
            return None
        finally:
            _end(process)
            _running.discard(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and whatever it has started that is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
