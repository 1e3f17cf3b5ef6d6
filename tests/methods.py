"""The methods of the family: every surrogate with every ratio that it goes with."""

from __future__ import annotations

import math
from typing import NamedTuple

from steppo_kernels import StepPOConfig
from steppo_kernels.config import RATIOS, SURROGATES


class Method(NamedTuple):
    """A surrogate and a ratio that go together, with bounds that some units reach."""

    surrogate: str
    ratio: str

    @property
    def numbers(self) -> dict[str, object]:
        """Return the keywords of the config."""
        found: dict[str, object] = self._asdict()
        if self.surrogate == "soft":
            found["soft_temperature"] = (1.5, 3.0)
        else:
            found |= {"clip_low": 0.4, "clip_high": 0.6}
        if self.surrogate == "clip":
            found["dual_clip"] = 1.7
        return found

    def config(self, **numbers: object) -> StepPOConfig:
        """Return the config, with other numbers where they are given; bounds if it has any."""
        if self.surrogate == "soft":
            numbers = {name: x for name, x in numbers.items() if not name.startswith("clip_")}
        return StepPOConfig(**{**self.numbers, **numbers})

    @property
    def is_differentiable(self) -> bool:
        """Whether the gradient is the derivative of the value: other weights are constants."""
        return self.surrogate not in ("cispo", "tv")

    def center(self) -> dict[str, float]:
        """Return the `ratio_center` that keeps what is not finite in its own step."""
        return {"ratio_center": 0.1} if self.ratio == "centered" else {}

    def share(self, length: int) -> float:
        """Return the derivative of the mean over a step's units by the log-prob of a token."""
        power = {"geometric": 1.0, "product": 0.0, "centered": 0.5, "token": 1.0}[self.ratio]
        return math.pow(length, -power)


METHODS = {
    f"{name}-{ratio}": Method(name, ratio)
    for name in SURROGATES
    for ratio in RATIOS
    if name != "tv" or ratio == "token"
}
# Each surrogate and each ratio, for Triton's interpreter and for what takes long.
FEW = {
    name: METHODS[name]
    for name in (
        "clip-token", "cispo-geometric", "mask-product", "soft-centered", "quadratic-geometric",
        "tv-token",
    )
}  # fmt: skip
DIFFERENTIABLE = {name: method for name, method in METHODS.items() if method.is_differentiable}
