"""The docstring of every public name ends with an example, and the example runs."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from docstrings import run_example
from worlds import is_possible

import steppo_kernels
from steppo_kernels import Metrics, StepLayout, distributed, memory


def public(module: Any) -> Iterator[tuple[str, Any]]:
    for name in module.__all__:
        if not name.startswith("_"):
            yield name, getattr(module, name)


def methods(owner: type) -> Iterator[tuple[str, Any]]:
    for name, value in vars(owner).items():
        if not name.startswith("_") and (
            inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod))
        ):
            yield f"{owner.__name__}.{name}", getattr(owner, name)


def objects() -> dict[str, Any]:
    found = [
        *public(steppo_kernels),
        *methods(StepLayout),
        *methods(Metrics),
        *((f"memory.{name}", value) for name, value in public(memory)),
    ]
    # Their examples make a group of one process.
    if is_possible():
        found += ((f"distributed.{name}", value) for name, value in public(distributed))
        found += methods(distributed.ContextShard)
    if importlib.util.find_spec("transformers") is not None:
        from steppo_kernels.integrations import transformers

        found += public(transformers)
    return dict(found)


OBJECTS = objects()


@pytest.mark.parametrize("name", OBJECTS)
def test_docstring_ends_with_an_example_that_runs(name):
    public = {key: value for key, value in OBJECTS.items() if "." not in key}
    run_example(name, OBJECTS[name], public)
