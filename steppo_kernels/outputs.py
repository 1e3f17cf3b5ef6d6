"""The results of the public functions: a loss with its metrics, and advantages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

# The order in which every backend fills the metric vector (csrc/include/steppo/types.h). More entries
# follow, which are not shown: of a policy loss, what its sums were divided by; of a value loss, that
# and the squared deviations of returns and residuals from their means. The last entry is the factor
# of the gradients (`backends/operators.py`).
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
# Of the weights of `rollout_weights`, as they are before the bounds.
ROLLOUT_METRICS: tuple[str, ...] = ("mean", "min", "max", "ess", "outside_fraction")


NUM_POLICY_METRICS = len(POLICY_METRICS) + 2
NUM_VALUE_METRICS = len(VALUE_METRICS) + 4


@dataclass(frozen=True, eq=False, init=False)
class Metrics:
    """Named scalars that stay on the device until they are asked for.

    Attributes:
        values: fp64, one entry per name and then what `merge` takes besides, on the device of the
            inputs, without gradient.
        names: the names of the first entries, in their order.
        adds_up: whether the losses among them are parts of a whole, which add up with other parts:
            they were divided by a given `normalizer`, or by nothing.

    Example:
        >>> layout = StepLayout.from_mask(torch.tensor([[0, 1, 1, 0, 1]]))
        >>> log_probs = torch.tensor([[0.0, -1.0, -2.0, 0.0, -1.0]])
        >>> metrics = steppo_loss(log_probs, None, torch.tensor([1.0, 2.0]), layout).metrics
        >>> metrics["num_steps"]
        tensor(2., dtype=torch.float64)
        >>> list(metrics)[:3]
        ['policy_loss', 'kl_loss', 'entropy']
    """

    values: Tensor
    names: tuple[str, ...]
    adds_up: bool

    def __init__(self, values: Tensor, names: tuple[str, ...], adds_up: bool = False) -> None:
        # Every loss makes one: this is a third of what a frozen dataclass does.
        self.__dict__.update(values=values, names=names, adds_up=adds_up)

    def as_dict(self) -> dict[str, float]:
        """Return the metrics as Python floats. This is the only copy to the host.

        Example:
            >>> layout = StepLayout.from_mask(torch.tensor([[0, 1, 1, 0, 1]]))
            >>> log_probs = torch.zeros(1, 5)
            >>> out = steppo_loss(log_probs, None, torch.tensor([1.0, 2.0]), layout)
            >>> out.metrics.as_dict()["policy_loss"]
            -1.5
        """
        return dict(zip(self.names, self.values.tolist(), strict=False))

    def __getitem__(self, name: str) -> Tensor:
        """Return one metric as a 0-dim tensor on the device, without a host copy."""
        if name not in self.names:
            raise KeyError(f"{name!r}, expected one of {', '.join(self.names)}")
        return self.values[self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def keys(self) -> tuple[str, ...]:
        """Return the names. With them ``dict(metrics)`` holds tensors on the device.

        Example:
            >>> metrics = Metrics(torch.tensor([0.5, 2.0]), ("value_loss", "num_steps"))
            >>> metrics.keys()
            ('value_loss', 'num_steps')
            >>> dict(metrics)
            {'value_loss': tensor(0.5000), 'num_steps': tensor(2.)}
        """
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

    Example:
        >>> layout = StepLayout.from_mask(torch.tensor([[0, 1, 1, 0, 1]]))
        >>> old = torch.zeros(1, 5)
        >>> new = torch.tensor([[0.0, 1.0, 0.5, 0.0, 0.25]])
        >>> out = steppo_loss(new, old, torch.tensor([-1.0, -1.0]), layout)
        >>> out.step_log_ratio
        tensor([0.7500, 0.2500])
        >>> torch.allclose(out.loss, out.step_log_ratio.exp().mean())
        True
    """

    loss: Tensor
    metrics: Metrics
    step_log_ratio: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StepAdvantages:
    """Advantages and returns of the steps, from `step_gae`.

    Attributes:
        advantages: ``[S]``, whitened if that was asked for; 0 for a step of no trajectory.
        returns: ``[S]`` raw advantage + value, never whitened; 0 for a step of no trajectory.

    Example:
        >>> layout = StepLayout.from_mask(torch.tensor([[0, 1, 1, 0, 1]]))
        >>> rewards, values = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])
        >>> found = step_gae(rewards, values, layout, gamma=0.5, whiten=False)
        >>> found.advantages, found.returns
        (tensor([0.0000, 0.5000]), tensor([0.5000, 1.0000]))
    """

    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True, eq=False)
class RolloutWeights:
    """Weights of the samples of another policy, from `rollout_weights`.

    Attributes:
        weights: the `is_weights` of a loss, without gradient: of the token shape at level
            ``"token"``, else ``[S]``. Masked positions and units without tokens have 1.
        metrics: `ROLLOUT_METRICS` of the weights before the bounds.

    Example:
        >>> layout = StepLayout.from_mask(torch.tensor([[0, 1, 1, 0, 1]]))
        >>> old, sampled = torch.tensor([[0.0, -1.0, -1.0, 0.0, -1.0]]), torch.full((1, 5), -1.0)
        >>> found = rollout_weights(old, sampled, layout, level="step")
        >>> found.weights
        tensor([1., 1.])
        >>> found.metrics.as_dict()["ess"]
        1.0
    """

    weights: Tensor
    metrics: Metrics
