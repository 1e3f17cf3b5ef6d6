"""The hyper-parameters of the step objective, checked when they are set."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

import torch

RatioKind = Literal["geometric", "product", "centered", "token"]
Surrogate = Literal["clip", "cispo", "mask", "soft", "quadratic", "tv"]
Reduction = Literal["step_mean", "trajectory_mean", "token_mean", "sum"]
KLEstimator = Literal["k1", "k2", "k3"]

# The position of a name is the number kernels know it by (csrc/include/steppo/types.h).
RATIOS: tuple[str, ...] = ("geometric", "product", "centered", "token")
SURROGATES: tuple[str, ...] = ("clip", "cispo", "mask", "soft", "quadratic", "tv")
REDUCTIONS: tuple[str, ...] = ("step_mean", "trajectory_mean", "token_mean", "sum")
KL_ESTIMATORS: tuple[str, ...] = ("k1", "k2", "k3")

_PLAIN: tuple[type, ...] = (bool, int, float)

# exp of more than this leaves the range of fp32, in which ratios are reported.
_LOG_RATIO_LIMIT = 80.0


# Bounds of the surrogate (the authors' scripts).
_CLIP = (3e-4, 4e-4)
# Temperatures of the soft surrogate where A >= 0 and where A < 0 (SAPO, arXiv 2511.20347).
_SOFT_TEMPERATURE = (1.0, 1.05)


class KernelConfig(NamedTuple):
    """A `StepPOConfig` as kernels take it: numbers alone, names as their positions.

    The fields are those of `PolicyConfig` in csrc/include/steppo/records.inc, in the same order.
    What is off is a number that never acts: a `dual_clip` of 0, token clips of infinity.
    """

    ratio: float
    surrogate: float
    clip_low: float
    clip_high: float
    dual_clip: float
    token_clip_low: float
    token_clip_high: float
    soft_positive: float
    soft_negative: float
    log_ratio_max: float
    reduction: float
    kl_coef: float
    kl_estimator: float
    entropy_coef: float

    @property
    def clips_tokens(self) -> bool:
        """Whether token log-ratios are clamped before they are pooled."""
        return min(self.token_clip_low, self.token_clip_high) < math.inf


@dataclass(frozen=True)
class StepPOConfig:
    r"""Hyper-parameters of `steppo_loss` (StepPO, arXiv 2604.18401, section 3; CAPO is its v5).

    x is a log-ratio, rho = e^x, A the advantage. A surrogate has the value l(x, A) and the
    derivative -A c by x: the weight c is what tells the methods apart.

    Attributes:
        ratio: how token log-ratios z of a step of L tokens form x:
            ``"geometric"`` mean z (StepPO), ``"product"`` sum z, ``"centered"``
            mu + L^-1/2 sum(z - mu) with mu the mean of z over the call (CAPO), or ``"token"``: z
            itself, each token its own (PPO, GRPO, and most agent methods).
        surrogate: ``"clip"`` max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)) (PPO);
            ``"cispo"`` -A c with the constant c = clip(rho, ...) (CISPO, arXiv 2506.13585);
            ``"mask"`` c = rho within the bounds, else 0, for either sign of A (IcePop, arXiv
            2510.18855); ``"soft"`` c = rho sech^2(t (rho - 1) / 2) (SAPO, arXiv 2511.20347);
            ``"quadratic"`` c = rho (1 - sign(A) (rho - 1) / eps), eps = clip_high where A > 0, else
            clip_low (SPO, arXiv 2401.16025); ``"tv"`` c = min(rho, e^log_ratio_max) where p - q <=
            clip_high (A > 0) or p - q >= -clip_low (A < 0), else 0, with p and q the new and the
            old probability of the token (DPPO-TV, arXiv 2602.04879; ratio ``"token"`` only).
        clip_low, clip_high: the bounds of the surrogate. The defaults are those of the authors'
            scripts, for means over steps of many tokens; ratios of single tokens want about 0.2.
            `steppo_loss` also takes bounds of its own for each step.
        dual_clip: c > 1 bounds the loss of ``"clip"`` with negative advantage by -c A; None is off.
        token_clip: (low, high), each >= 0: before pooling, z becomes min(z, high) where A >= 0 and
            max(z, -low) where A < 0, without gradient where that bites (GMPO, arXiv 2507.20673).
            None is off.
        soft_temperature: t of ``"soft"`` where A >= 0, and where A < 0.
        log_ratio_max: x is clamped above at this; there the gradient is zero, but for ``"cispo"``
            and ``"tv"``, whose weight is a constant.
        reduction: ``"step_mean"``, ``"trajectory_mean"`` (the paper's equation), ``"token_mean"``
            or ``"sum"``.
        kl_coef: weight of the KL penalty against ``ref_log_probs``.
        kl_estimator: ``"k1"`` -d, ``"k2"`` d^2/2 or ``"k3"`` e^d - d - 1, d = log ref - log pi
            clamped to +-20, the value to +-10; no gradient beyond.
        entropy_coef: weight of the entropy bonus.

    Raises:
        ValueError: a value is not finite, out of range or not one of the names above; or values
            that mean nothing together.
        TypeError: a value is not a number where one is wanted.

    Example:
        >>> ppo = StepPOConfig(
        ...     ratio="token", clip_low=0.2, clip_high=0.2, reduction="token_mean"
        ... )
        >>> ppo.surrogate, ppo.clip_high
        ('clip', 0.2)
        >>> StepPOConfig(clip_low=-1.0)
        Traceback (most recent call last):
        ValueError: clip_low: got -1.0, expected a number in [0, 1]
    """

    ratio: RatioKind = "geometric"
    surrogate: Surrogate = "clip"
    clip_low: float = _CLIP[0]
    clip_high: float = _CLIP[1]
    dual_clip: float | None = None
    token_clip: tuple[float, float] | None = None
    soft_temperature: tuple[float, float] = _SOFT_TEMPERATURE
    log_ratio_max: float = 10.0
    reduction: Reduction = "step_mean"
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    entropy_coef: float = 0.0

    # The same numbers as kernels take them.
    kernel: ClassVar[KernelConfig]

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        one_of("ratio", self.ratio, RATIOS)
        one_of("surrogate", self.surrogate, SURROGATES)
        one_of("reduction", self.reduction, REDUCTIONS)
        one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        _in_range("clip_low", self.clip_low, 0.0, 1.0, "[0, 1]")
        _in_range("clip_high", self.clip_high, 0.0, math.inf, "[0, inf)")
        _in_range("kl_coef", self.kl_coef, 0.0, math.inf, "[0, inf)")
        _in_range("entropy_coef", self.entropy_coef, -math.inf, math.inf, "finite")
        _above("log_ratio_max", self.log_ratio_max, 0.0, _LOG_RATIO_LIMIT, "(0, 80]")
        if self.dual_clip is not None:
            _above("dual_clip", self.dual_clip, 1.0, math.inf, "(1, inf) or None")
        if self.token_clip is not None:
            for value in _pair("token_clip", self.token_clip):
                _in_range("token_clip", value, 0.0, math.inf, "[0, inf)")
        for value in _pair("soft_temperature", self.soft_temperature):
            _above("soft_temperature", value, 0.0, math.inf, "(0, inf)")
        self._check_combinations()
        object.__setattr__(self, "kernel", self._as_kernel())

    def _check_combinations(self) -> None:
        ratio, surrogate = self.ratio, self.surrogate
        if surrogate == "tv" and ratio != "token":
            raise ValueError(
                f"ratio: got {ratio!r} with the surrogate 'tv', expected 'token': it compares the "
                "probabilities of single tokens"
            )
        if self.dual_clip is not None and surrogate != "clip":
            raise ValueError(
                f"dual_clip: got {self.dual_clip!r} with the surrogate {surrogate!r}, expected "
                "None: it bounds the loss of 'clip'"
            )
        if self.token_clip is not None and ratio == "token":
            raise ValueError(
                f"token_clip: got {self.token_clip!r} with the ratio 'token', expected None: it "
                "clamps tokens before they are pooled"
            )
        if self.soft_temperature != _SOFT_TEMPERATURE and surrogate != "soft":
            raise ValueError(
                f"soft_temperature: got {self.soft_temperature!r} with the surrogate "
                f"{surrogate!r}, expected the default: only 'soft' has a temperature"
            )
        for name, default in zip(("clip_low", "clip_high"), _CLIP, strict=True):
            value = getattr(self, name)
            if surrogate == "quadratic" and value == 0:
                raise ValueError(
                    f"{name}: got {value!r} with the surrogate 'quadratic', expected a number "
                    "above 0: it divides by its bounds"
                )
            if surrogate == "soft" and value != default:
                raise ValueError(
                    f"{name}: got {value!r} with the surrogate 'soft', expected the default: it "
                    "has no bounds"
                )

    def _as_kernel(self) -> KernelConfig:
        token_low, token_high = self.token_clip or (math.inf, math.inf)
        return KernelConfig(
            ratio=float(RATIOS.index(self.ratio)),
            surrogate=float(SURROGATES.index(self.surrogate)),
            clip_low=float(self.clip_low),
            clip_high=float(self.clip_high),
            dual_clip=float(self.dual_clip or 0.0),
            token_clip_low=float(token_low),
            token_clip_high=float(token_high),
            soft_positive=float(self.soft_temperature[0]),
            soft_negative=float(self.soft_temperature[1]),
            log_ratio_max=float(self.log_ratio_max),
            reduction=float(REDUCTIONS.index(self.reduction)),
            kl_coef=float(self.kl_coef),
            kl_estimator=float(KL_ESTIMATORS.index(self.kl_estimator)),
            entropy_coef=float(self.entropy_coef),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

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


def _plain(value: Any) -> Any:
    """Return a number of another type, such as numpy's, as Python's, so that it can be saved."""
    if isinstance(value, (tuple, list)):
        return tuple(_plain(one) for one in value)
    is_foreign = isinstance(value, numbers.Real) and type(value) not in _PLAIN
    return float(value) if is_foreign else value


def _pair(name: str, value: object) -> tuple[Any, Any]:
    if not isinstance(value, tuple) or len(value) != 2:
        got = f"{len(value)} of them" if isinstance(value, tuple) else type(value).__name__
        error = ValueError if isinstance(value, tuple) else TypeError
        raise error(f"{name}: got {got}, expected two numbers")
    return value


def _above(name: str, value: Any, low: float, high: float, expected: str) -> None:
    _in_range(name, value, low, high, expected)
    if value == low:
        raise ValueError(f"{name}: got {value!r}, expected a number in {expected}")


def _in_range(name: str, value: object, low: float, high: float, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number in {expected}")
    # The largest float also bounds integers that no float holds.
    if not (low <= value <= high and abs(value) <= sys.float_info.max):
        raise ValueError(f"{name}: got {value!r}, expected a number in {expected}")


DEFAULT_CONFIG = StepPOConfig()
