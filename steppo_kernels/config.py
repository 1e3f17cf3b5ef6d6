"""The hyper-parameters of the clipped step objective, checked when they are set."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

RatioKind = Literal["geometric", "product", "centered"]
Reduction = Literal["step_mean", "trajectory_mean", "token_mean", "sum"]
KLEstimator = Literal["k1", "k2", "k3"]

# The position of a name is the number kernels know it by (csrc/include/steppo/types.h).
RATIOS: tuple[str, ...] = ("geometric", "product", "centered")
REDUCTIONS: tuple[str, ...] = ("step_mean", "trajectory_mean", "token_mean", "sum")
KL_ESTIMATORS: tuple[str, ...] = ("k1", "k2", "k3")

_PLAIN: tuple[type, ...] = (bool, int, float)

# exp of more than this leaves the range of fp32, in which ratios are reported.
_LOG_RATIO_LIMIT = 80.0


@dataclass(frozen=True)
class StepPOConfig:
    """Hyper-parameters of `steppo_loss` (StepPO, arXiv 2604.18401, section 3; CAPO is its v5).

    Attributes:
        ratio: how token log-ratios z of a step of L tokens form the step ratio:
            ``"geometric"`` exp(mean z) (StepPO), ``"product"`` exp(sum z), ``"centered"``
            exp(mu + L^-1/2 sum(z - mu)) with mu the mean of z over the call (CAPO).
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]. The defaults
            are those of the authors' scripts, for means over steps of many tokens; ratios of single
            tokens (PPO, ``layout.per_token()``) want about 0.2.
        dual_clip: c > 1 bounds the loss of steps with negative advantage by -c A; None is off.
        log_ratio_max: log-ratios are clamped above at this; there the gradient is zero.
        reduction: ``"step_mean"``, ``"trajectory_mean"`` (the paper's equation), ``"token_mean"``
            or ``"sum"``.
        kl_coef: weight of the KL penalty against ``ref_log_probs``.
        kl_estimator: ``"k1"`` -d, ``"k2"`` d^2/2 or ``"k3"`` e^d - d - 1, d = log ref - log pi
            clamped to +-20, the value to +-10; no gradient beyond.
        entropy_coef: weight of the entropy bonus.

    Raises:
        ValueError: a value is not finite, out of range or not one of the names above.
        TypeError: a value is not a number where one is wanted.

    Example:
        >>> ppo = StepPOConfig(clip_low=0.2, clip_high=0.2, reduction="token_mean")
        >>> ppo.ratio, ppo.clip_high
        ('geometric', 0.2)
        >>> StepPOConfig(clip_low=-1.0)
        Traceback (most recent call last):
        ValueError: clip_low: got -1.0, expected a number in [0, 1]
    """

    ratio: RatioKind = "geometric"
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    dual_clip: float | None = None
    log_ratio_max: float = 10.0
    reduction: Reduction = "step_mean"
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # Numbers of other types, such as numpy's, are kept as Python's: so they can be saved.
            if isinstance(value, numbers.Real) and type(value) not in _PLAIN:
                object.__setattr__(self, field.name, float(value))
        one_of("ratio", self.ratio, RATIOS)
        one_of("reduction", self.reduction, REDUCTIONS)
        one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        _in_range("clip_low", self.clip_low, 0.0, 1.0, "[0, 1]")
        _in_range("clip_high", self.clip_high, 0.0, math.inf, "[0, inf)")
        _in_range("kl_coef", self.kl_coef, 0.0, math.inf, "[0, inf)")
        _in_range("entropy_coef", self.entropy_coef, -math.inf, math.inf, "finite")
        _in_range("log_ratio_max", self.log_ratio_max, 0.0, _LOG_RATIO_LIMIT, "(0, 80]")
        if self.log_ratio_max == 0.0:
            raise ValueError("log_ratio_max: got 0.0, expected a number in (0, 80]")
        if self.dual_clip is not None:
            _in_range("dual_clip", self.dual_clip, 1.0, math.inf, "(1, inf) or None")
            if self.dual_clip == 1.0:
                raise ValueError("dual_clip: got 1.0, expected a number in (1, inf) or None")

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        known = {field.name: field.default for field in fields(self)}
        for name, value in {**known, **state}.items():
            if name not in known:
                raise ValueError(f"StepPOConfig: got {name!r}, expected {', '.join(known)}")
            object.__setattr__(self, name, value)
        self.__post_init__()


torch.serialization.add_safe_globals([StepPOConfig])


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise unless `value` is one of the names that are allowed."""
    if not isinstance(value, str) or value not in allowed:
        # The text of an object of another type may be long, or be that of memory that is gone.
        got = repr(value) if value is None or isinstance(value, str) else type(value).__name__
        raise ValueError(f"{name}: got {got}, expected one of {', '.join(map(repr, allowed))}")


def _in_range(name: str, value: object, low: float, high: float, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number in {expected}")
    # The largest float also bounds integers that no float holds.
    if not (low <= value <= high and abs(value) <= sys.float_info.max):
        raise ValueError(f"{name}: got {value!r}, expected a number in {expected}")


DEFAULT_CONFIG = StepPOConfig()
