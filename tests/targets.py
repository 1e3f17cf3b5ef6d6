"""What a test runs on."""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """A backend and the device of the tensors it is given."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter, a thousand times slower than on a GPU."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def emulated(self) -> bool:
        """Whether kernels of a GPU run on the CPU, where tens of thousands of blocks take long."""
        return self.backend in ("triton", "cuda") and self.device == "cpu"

    @property
    def name(self) -> str:
        """The backend, and "-gpu" if that is where it runs."""
        return self.backend if self.device == "cpu" else f"{self.backend}-gpu"
