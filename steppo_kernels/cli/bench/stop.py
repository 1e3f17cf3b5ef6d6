"""An end to what cannot be asked to be brief: a compiler."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


class OutOfTime(BaseException):
    """Time is up. It is no `Exception`: compilers catch those, and try something else."""


@contextlib.contextmanager
def stopped_at(deadline: float) -> Iterator[None]:
    """Raise `OutOfTime` inside when `deadline` comes, by `time.monotonic`.

    Only the main thread of a POSIX system can be interrupted. Elsewhere what is inside takes its
    time.

    Raises:
        OutOfTime: it came.
    """
    if not hasattr(signal, "setitimer") or not _is_main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    # A timer of 0 would be none.
    signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
