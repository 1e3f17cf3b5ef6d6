"""The CUDA kernels as launchers take them, on CPU tensors."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cuda_on_host
import pytest
import torch

from steppo_kernels.backends.compiled.launch import Native

# The folder benchmarks/ is not installed. Whatever is installed comes first.
sys.path.append(str(Path(__file__).parents[2]))


@pytest.fixture(scope="session")
def host_module() -> ModuleType:
    try:
        path = cuda_on_host.module()
    except cuda_on_host.CannotBuild as error:
        pytest.skip(str(error))
    spec = importlib.util.spec_from_file_location("_C_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    found.order = cuda_on_host.order_of(path)
    return found


# Drawn, two blocks take turns, and three blocks do the work of all.
_ORDERS = {"in-order": (0, 1), "backwards": (1, 1), "drawn": (5, 2, 3)}


@pytest.fixture(params=list(_ORDERS.values()), ids=list(_ORDERS))
def cuda(host_module: ModuleType, request: pytest.FixtureRequest) -> Iterator[Native]:
    """Kernels whose threads run in an order; what they keep between launches is looked at."""
    host_module.order(*request.param)
    # Counters are 0, and the rest is what was never written.
    counters, size = host_module.workspace
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8)
    workspace[:counters] = 0
    yield Native(host_module, lambda _: (0, workspace.data_ptr(), 0, 0), is_done=False)
    host_module.order(0, 1)
    assert not workspace[:counters].any(), "a launch left a counter that is not 0"
