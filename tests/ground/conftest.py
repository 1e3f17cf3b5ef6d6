"""Backends that cannot run, for the tests of what is said then."""

from __future__ import annotations

import pytest
import torch

from steppo_kernels.backends import choice


@pytest.fixture
def cuda_takes_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of cuda take no CPU tensors, even if they are built for the host."""
    unavailable = choice.unavailable

    def without_cuda(backend: str, device: torch.device) -> str | None:
        return "it takes tensors on cuda" if backend == "cuda" else unavailable(backend, device)

    monkeypatch.setattr(choice, "unavailable", without_cuda)
    monkeypatch.setattr(choice, "_resolved", choice._resolved.__wrapped__)
