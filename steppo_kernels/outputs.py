"""What the public functions return."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

# The order in which every backend fills the metric vector (csrc/include/steppo/types.h).
POLICY_METRICS: tuple[str, ...] = (
    "policy_loss",
    "kl_loss",
    "entropy",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "clip_fraction",
    "clip_fraction_low",
    "clip_fraction_high",
    "token_clip_fraction",
    "approx_kl",
    "approx_kl_k3",
    "dead_token_fraction",
    "num_steps",
    "num_tokens",
)
VALUE_METRICS: tuple[str, ...] = (
    "value_loss",
    "clip_fraction",
    "value_mean",
    "return_mean",
    "explained_variance",
    "num_steps",
)


@dataclass(frozen=True, eq=False)
class Metrics:
    """Named scalars that stay on the device until they are asked for.

    Attributes:
        values: fp64 ``[len(names)]`` on the device of the inputs, without gradient.
        names: what each entry is.
    """

    values: Tensor
    names: tuple[str, ...]

    def as_dict(self) -> dict[str, float]:
        """Return the metrics as Python floats. This is the only copy to the host."""
        return dict(zip(self.names, self.values.tolist(), strict=True))

    def __getitem__(self, name: str) -> Tensor:
        """Return one metric as a 0-dim tensor on the device, without a host copy."""
        if name not in self.names:
            raise KeyError(f"{name!r}, expected one of {', '.join(self.names)}")
        return self.values[self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def keys(self) -> tuple[str, ...]:
        """Return the names, so that ``dict(metrics)`` is of tensors on the device."""
        return self.names


# Not frozen: ``output.loss /= k`` divides the tensor in place and then assigns it.
@dataclass(eq=False)
class StepPOOutput:
    """A loss and what it was made of.

    Attributes:
        loss: 0-dim, a fresh tensor that may be modified in place: ``output.loss /= k`` works.
        metrics: see `Metrics`.
        step_log_ratio: log-ratio of each step before the upper clamp, ``[S]`` without gradient;
            0 for an empty step. None for the value loss, and where a mask was given instead of a
            layout (`linear_steppo_loss` makes a layout of it).
    """

    loss: Tensor
    metrics: Metrics
    step_log_ratio: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StepAdvantages:
    """Step-level GAE.

    Attributes:
        advantages: ``[S]``, whitened if that was asked for; 0 for a step of no trajectory.
        returns: ``[S]`` raw advantage + value, never whitened; 0 for a step of no trajectory.
    """

    advantages: Tensor
    returns: Tensor
