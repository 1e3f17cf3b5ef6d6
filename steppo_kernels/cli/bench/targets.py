"""Which backends have times that mean something."""

from __future__ import annotations

from ...backends import choice


def without_meaning(name: str) -> str | None:
    """Return why the times of a backend that runs here mean nothing, or None if they do."""
    if name == "triton" and choice.triton_interprets():
        return "triton is left out: TRITON_INTERPRET=1 runs its kernels in Python, for tests."
    if name == "cuda" and choice.cuda_on_host():
        return "cuda is left out: STEPPO_CUDA_ON_HOST runs its kernels on the host, for tests."
    return None
