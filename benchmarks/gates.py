"""What has to hold before anything is timed."""

from __future__ import annotations

from torch import Tensor

from steppo_kernels.backends import choice


def fused_backend() -> choice.Backend:
    """Return the compiled backend that is measured, or raise saying why there is none."""
    if why := choice.why_not_cpu():
        raise RuntimeError(f"the C++ backend cannot run here: {why}")
    return "cpu"


def assert_close(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise unless the error is below `tolerance` times `expected`, as root mean squares."""
    got, expected = got.detach().double(), expected.detach().double()
    if got.shape != expected.shape:
        raise AssertionError(f"{name}: got shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    error = (got - expected).square().mean().sqrt()
    scale = expected.square().mean().sqrt().clamp_min(1e-30)
    if not float(error / scale) <= tolerance:
        raise AssertionError(
            f"{name}: off by {float(error / scale):.1e} of the expected root mean square, "
            f"allowed is {tolerance:.0e}; nothing is timed"
        )
