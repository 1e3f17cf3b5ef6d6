"""What objects that hold tensors are pickled as."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from typing import TypeVar

_State = TypeVar("_State")


def state_of(owner: object, make: Callable[[], _State]) -> _State:
    """Return the state of `owner` that `make` makes of copies of its tensors.

    A process that is being started opens the memory of tensors after they were pickled. The owner
    holds the state until then.
    """
    if get_spawning_popen() is None:
        return make()
    held: dict[str, _State] = owner.__dict__
    return held.setdefault("_sent", make())
