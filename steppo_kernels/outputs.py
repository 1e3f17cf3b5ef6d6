"""The results of the public functions: a loss with its metrics, and advantages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# The order in which every backend fills the metric vector (csrc/include/steppo/types.h). The hidden
# entries below follow.
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


# Entries behind those, which are not shown: `Metrics.merge` needs them. `denominator` is what the
# sums of a loss were divided by. The squares of a value loss are of deviations from the mean.
_HIDDEN: dict[tuple[str, ...], tuple[str, ...]] = {
    POLICY_METRICS: ("denominator",),
    VALUE_METRICS: ("denominator", "return_squares", "residual_squares"),
    ROLLOUT_METRICS: ("num_weights", "sum", "sum_of_squares"),
}
NUM_POLICY_METRICS = len(POLICY_METRICS) + len(_HIDDEN[POLICY_METRICS])
NUM_VALUE_METRICS = len(VALUE_METRICS) + len(_HIDDEN[VALUE_METRICS])


# Those that add up with the ones of other parts, if they were divided by a number of the whole.
_LOSSES = ("policy_loss", "kl_loss", "entropy", "value_loss")


@dataclass(frozen=True, eq=False)
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
    adds_up: bool = False

    @staticmethod
    def merge(parts: Iterable[Metrics]) -> Metrics:
        """Return the metrics of a whole from those of its parts: micro-batches, ranks, merges.

        Means are weighted by the number of what they are means of, and extremes and counts are
        those of the whole. `policy_loss`, `kl_loss`, `entropy` and `value_loss` are weighted by
        what each part divided them by; where they add up (`adds_up`), they are added. A part
        without any step counts for nothing. It all happens on the device of the parts, and nothing
        is copied to the host.

        The result is that of one call on the whole batch if no step is in two parts, nor a
        trajectory with the reduction ``"trajectory_mean"`` or weights at level ``"trajectory"``.
        With the ratio ``"centered"``, that also takes a `ratio_center`.

        Args:
            parts: metrics of one function, at least one, on one device.

        Returns:
            `Metrics`, which can be merged again.

        Raises:
            TypeError: `parts` are not a list, or not of metrics.
            ValueError: there are none; they have different names or devices; the losses of some add
                up and those of others do not; or their values are not as a function of this package
                made them.

        Example:
            >>> layout = StepLayout.from_mask(torch.tensor([[0, 1, 1, 0, 1]]))
            >>> old, new = torch.zeros(1, 5), torch.full((1, 5), 0.1)
            >>> first = steppo_loss(new, old, torch.tensor([1.0, 2.0]), layout).metrics
            >>> second = steppo_loss(old, old, torch.tensor([1.0]), layout.per_trajectory()).metrics
            >>> whole = Metrics.merge([first, second]).as_dict()
            >>> whole["num_steps"], round(whole["ratio_mean"], 4), round(whole["approx_kl"], 4)
            (3.0, 1.0701, -0.05)
        """
        return _merged(parts)

    def to(self, device: torch.device | str) -> Metrics:
        """Return the metrics on another device.

        Example:
            >>> metrics = Metrics(torch.tensor([0.5, 2.0]), ("value_loss", "num_steps"))
            >>> metrics.to("meta").values.device
            device(type='meta')
        """
        return replace(self, values=self.values.to(torch.device(device)))

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


def with_divided_losses(metrics: Metrics, number: int) -> Metrics:
    """Return metrics as if the normalizer had been `number` times as large, if losses add up."""
    if not metrics.adds_up:
        return metrics
    names = metrics.names + _HIDDEN[metrics.names]
    factors = {**dict.fromkeys(_LOSSES, 1 / number), "denominator": float(number)}
    scale = [factors.get(name, 1.0) for name in names]
    return replace(metrics, values=metrics.values * metrics.values.new_tensor(scale))


class _Parts:
    """The metric vectors of several parts, by the names of their entries.

    A part counts if the entry `counted` of its vector is above 0. The others are left out: their
    entries stand for nothing.
    """

    def __init__(self, parts: list[Metrics], counted: str) -> None:
        self.names = parts[0].names + _HIDDEN[parts[0].names]
        self.adds_up = parts[0].adds_up
        rows = torch.stack([part.values.detach().to(torch.float64) for part in parts])
        self.columns = dict(zip(self.names, rows.unbind(1), strict=True))
        self.counts = self.columns[counted] > 0
        self.is_empty = ~self.counts.any()

    def __getitem__(self, name: str) -> Tensor:
        """Return an entry of each part, 0 of one that does not count."""
        return torch.where(self.counts, self.columns[name], 0.0)

    def sum(self, name: str) -> Tensor:
        return self[name].sum()

    def mean(self, name: str, weight: str) -> Tensor:
        """Return the mean weighted by another entry, 0 of nothing."""
        return self._mean(self[name], self[weight])

    def loss(self, name: str) -> Tensor:
        return self.sum(name) if self.adds_up else self.mean(name, "denominator")

    def denominator(self) -> Tensor:
        """Return what the merged losses count as divided by: parts that add up share theirs."""
        return self["denominator"].amax() if self.adds_up else self.sum("denominator")

    def least(self, name: str) -> Tensor:
        return self.or_one(torch.where(self.counts, self.columns[name], math.inf).amin())

    def largest(self, name: str) -> Tensor:
        return self.or_one(torch.where(self.counts, self.columns[name], -math.inf).amax())

    def or_one(self, value: Tensor) -> Tensor:
        """Return the value, or 1 if no part counts."""
        return torch.where(self.is_empty, 1.0, value)

    def squares(self, squares: Tensor, means: Tensor, weight: str) -> Tensor:
        """Return the squared deviations from the mean of all, from those of each part from its."""
        weights = self[weight]
        return (squares + weights * (means - self._mean(means, weights)) ** 2).sum()

    def _mean(self, values: Tensor, weights: Tensor) -> Tensor:
        return (weights * values).sum() / torch.where(self.is_empty, 1.0, weights.sum())


def _merged(parts: Iterable[Metrics]) -> Metrics:
    if isinstance(parts, Metrics) or not isinstance(parts, Iterable):
        raise TypeError(f"parts: got {type(parts).__name__}, expected a list of Metrics")
    given = list(parts)
    if not given:
        raise ValueError("parts: got none, expected at least one Metrics")
    for place, part in enumerate(given):
        _check_part(f"parts[{place}]", part, given[0])
    if given[0].names == POLICY_METRICS:
        merged = _policy(_Parts(given, "num_steps"))
    elif given[0].names == VALUE_METRICS:
        merged = _value(_Parts(given, "num_steps"))
    else:
        merged = _rollout(_Parts(given, "num_weights"))
    names = given[0].names + _HIDDEN[given[0].names]
    return replace(given[0], values=torch.stack([merged[name] for name in names]))


def _check_part(name: str, part: object, first: Metrics) -> None:
    if not isinstance(part, Metrics):
        raise TypeError(f"{name}: got {type(part).__name__}, expected Metrics")
    if part.names not in _HIDDEN:
        raise ValueError(
            f"{name}: got the names {', '.join(part.names)}, expected those of a policy loss, a "
            "value loss or rollout weights"
        )
    length = len(part.names) + len(_HIDDEN[part.names])
    if part.values.shape != (length,):
        raise ValueError(
            f"{name}: got values of shape {tuple(part.values.shape)}, expected ({length},) as a "
            "function of this package makes them"
        )
    if part.names != first.names:
        raise ValueError(
            f"{name}: got the names {', '.join(part.names)}, expected those of parts[0]: "
            f"{', '.join(first.names)}"
        )
    if part.values.device != first.values.device:
        raise ValueError(
            f"{name}: got it on {part.values.device}, expected {first.values.device} as parts[0]"
        )
    if part.adds_up != first.adds_up:
        kinds = ("has a denominator of its own", "adds up with others")
        raise ValueError(
            f"{name}: got a loss that {kinds[part.adds_up]}, expected one that "
            f"{kinds[first.adds_up]} as parts[0]: give every part the normalizer of the whole, or "
            "give it to none"
        )


def _policy(parts: _Parts) -> dict[str, Tensor]:
    losses = {name: parts.loss(name) for name in _LOSSES if name in parts.names}
    over_steps = ("clip_fraction", "clip_fraction_low", "clip_fraction_high")
    over_tokens = ("token_clip_fraction", "approx_kl", "approx_kl_k3", "dead_token_fraction")
    return {
        **losses,
        "ratio_mean": parts.or_one(parts.mean("ratio_mean", "num_steps")),
        "ratio_min": parts.least("ratio_min"),
        "ratio_max": parts.largest("ratio_max"),
        **{name: parts.mean(name, "num_steps") for name in over_steps},
        **{name: parts.mean(name, "num_tokens") for name in over_tokens},
        "num_steps": parts.sum("num_steps"),
        "num_tokens": parts.sum("num_tokens"),
        "denominator": parts.denominator(),
    }


def _value(parts: _Parts) -> dict[str, Tensor]:
    returns, values = parts["return_mean"], parts["value_mean"]
    spread = parts.squares(parts["return_squares"], returns, "num_steps")
    unexplained = parts.squares(parts["residual_squares"], returns - values, "num_steps")
    return {
        "value_loss": parts.loss("value_loss"),
        **{n: parts.mean(n, "num_steps") for n in ("clip_fraction", "value_mean", "return_mean")},
        "explained_variance": torch.where(spread == 0, 0.0, 1 - unexplained / spread),
        "num_steps": parts.sum("num_steps"),
        "denominator": parts.denominator(),
        "return_squares": spread,
        "residual_squares": unexplained,
    }


def _rollout(parts: _Parts) -> dict[str, Tensor]:
    count, total, squares = (parts.sum(n) for n in ("num_weights", "sum", "sum_of_squares"))
    return {
        "mean": parts.or_one(total / count),
        "min": parts.least("min"),
        "max": parts.largest("max"),
        "ess": parts.or_one(total.square() / (count * squares)),
        "outside_fraction": parts.mean("outside_fraction", "num_weights"),
        "num_weights": count,
        "sum": total,
        "sum_of_squares": squares,
    }


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


# They may be in what `torch.load` reads, as layouts and configs may.
torch.serialization.add_safe_globals([Metrics, StepPOOutput, StepAdvantages, RolloutWeights])
