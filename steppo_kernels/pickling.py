"""What objects that hold tensors are pickled as."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from typing import Any, TypeVar

_State = TypeVar("_State")


def state_of(make: Callable[[], _State]) -> _State:
    """Return the state that `make` makes of copies of an object's tensors.

    A process that is being started opens the memory of tensors after they were pickled. What stands
    for that process here holds the state.
    """
    state, started = make(), get_spawning_popen()
    if started is not None:
        held: dict[str, Any] = vars(started)
        held.setdefault("_states_of_steppo_kernels", []).append(state)
    return state
