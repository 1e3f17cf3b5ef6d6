"""The demo: a small agent learns to cross a frozen lake, on the CPU, in a minute or two."""

from __future__ import annotations

try:
    from .results import DemoResult, Run
    from .run import run_demo
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] == "steppo_kernels":
        raise
    raise ModuleNotFoundError(
        f"The demo needs the package {error.name}: pip install '.[demo]' in a clone",
        name=error.name,
    ) from error

__all__ = ["DemoResult", "Run", "run_demo"]
