"""How an operator is registered, and the two ways to call one.

Eager code calls the launcher of a backend directly; under `torch.compile` the same call becomes
the registered operator ``torch.ops.steppo.<name>``, so that the graph does not break. Autograd
lives outside, in the public functions: an operator returns what backward needs.

A launcher is the function ``<name>`` in ``<stem>.py`` of the backend's folder. It takes checked,
contiguous tensors on one device and the schema's arguments without the last, `backend`. Tensors
that belong together are one record (`records.py`), a ``Tensor[]`` in the schema, and numbers are
one ``float[]``. An output that is not needed may be None; the registered operator makes it empty.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_compiling

from .records import IdIndex, Sets, States, Steps, Timeline

_library = torch.library.Library("steppo", "DEF")
# The backends that share the launchers in `compiled/`.
_COMPILED = ("cpu", "cuda")
_RECORDS = (Steps, Timeline, States, Sets, IdIndex)
# Kernels of `cuda` keep a workspace between calls, and launchers what they allocate others like.
# Neither may come from the memory of the graphs that `mode="reduce-overhead"` records.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
_PROXY = torch._C._TorchDispatchModeKey.PROXY
stems: dict[str, str] = {}
handles: dict[str, Any] = {}


def call(name: str, backend: str, *args: Any) -> Any:
    """Run the operator `name` on `backend`, through the dispatcher only while compiling."""
    return runner(name, backend)(*args)


def runner(name: str, backend: str) -> Callable[..., Any]:
    """Return what `call` calls.

    Raises:
        RuntimeError: what records operators of torch would not see what a kernel writes.
    """
    if not is_compiling():
        refuse_recording(backend)
        return launcher(backend, name)

    def compiled(*args: Any) -> Any:
        # A compiler knows the tensors of a record as a list.
        return handles[name](*[list(x) if isinstance(x, _RECORDS) else x for x in args], backend)

    return compiled


def refuse_recording(backend: str) -> None:
    """Refuse a call that records of torch's operators would miss; a compiler knows ours.

    Raises:
        RuntimeError: it runs kernels, and torch.jit.trace or make_fx watches.
    """
    is_traced = torch._C._get_tracing_state() is not None
    if not is_traced and torch._C._get_dispatch_mode(_PROXY) is None:
        return
    if backend != "reference" and not is_compiling():
        raise RuntimeError(
            f"backend: got a call of {backend!r} within torch.jit.trace or make_fx, which do not "
            "see what kernels write, expected torch.compile or torch.export, or 'reference'"
        )


@functools.cache
def launcher(backend: str, name: str) -> Callable[..., Any]:
    """Return the function that runs the operator `name` on `backend`."""
    stem = stems[name]
    folder = "compiled" if backend in _COMPILED else backend
    if stem == "lm_head" and backend != "cpu":
        folder = "gpu"
    module = importlib.import_module(f"{__package__}.{folder}.{stem}")
    run: Callable[..., Any] = getattr(module, name)
    if folder == "compiled":
        launch = importlib.import_module(f"{__package__}.{folder}.launch")
        return functools.partial(run, launch.native_of(backend))
    return run


def operator(stem: str, schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the fake of an operator with this schema."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        name = fake.__name__

        def dispatch(*args: Any) -> Any:
            # The dispatcher makes lists of the tuples that launchers hand on as they are.
            given = [tuple(x) if isinstance(x, list) else x for x in args[:-1]]
            outputs = launcher(args[-1], name)(*given)
            if not isinstance(outputs, tuple):
                return outputs
            # The first output is always there.
            return tuple(outputs[0].new_empty((0,)) if x is None else x for x in outputs)

        stems[name] = stem
        _library.define(f"{name}{schema}", tags=_TAGS)
        _library.impl(name, dispatch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"steppo::{name}", fake, lib=_library)
        handles[name] = getattr(torch.ops.steppo, name).default
        return fake

    return register
