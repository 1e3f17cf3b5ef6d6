"""The modules of compiled kernels: where they are, and why one is not there."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[1]


@functools.cache
def module_of(backend: str) -> Any:
    """Return the bindings of a compiled backend, `cpu` or `cuda`.

    The environment variable STEPPO_CUDA_ON_HOST is a file with the kernels of `cuda` that was built
    for the host (tests/cuda_on_host.py); they take CPU tensors.

    Raises:
        ImportError: the module is not there or cannot be loaded; the text says why.
    """
    name = f"steppo_kernels._C_{backend}"
    on_host = os.environ.get("STEPPO_CUDA_ON_HOST", "0")
    if backend == "cuda" and on_host != "0":
        return _loaded(name, on_host)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        note = _PACKAGE / f"_C_{backend}.missing"
        why = note.read_text().strip() if note.exists() else f"not built: {error}"
        raise ImportError(why) from error
    except ImportError as error:
        raise ImportError(f"built, but it cannot be loaded: {error}") from error


def _loaded(name: str, path: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ImportError(
            f"STEPPO_CUDA_ON_HOST: got {path!r}, expected the file that tests/cuda_on_host.py "
            "builds and prints"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
