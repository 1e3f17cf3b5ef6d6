"""Functions that have to become one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from steppo_kernels.backends.untraced import traced


def need_whole_graphs() -> None:
    """Skip a test where this torch cannot trace the package."""
    if traced(need_whole_graphs) is not need_whole_graphs:
        pytest.skip(f"graphs break at the package with torch {torch.__version__}")


def in_one_graph(function: Callable[..., Any], backend: Any = "aot_eager") -> Callable[..., Any]:
    """Compile a function without a graph break."""
    need_whole_graphs()
    return torch.compile(function, backend=backend, fullgraph=True)
