"""The settings of the policy losses: verl's own where it has them, and what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from verl.workers.config import ActorConfig, PolicyLossConfig

from ... import checks
from ...config import DEFAULT_CONFIG, RatioKind, Reduction, StepPOConfig, Surrogate, one_of

# The ratio of each policy loss that is registered.
RATIO_OF_MODE: dict[str, RatioKind] = {"steppo": "geometric", "capo": "centered"}


@dataclass
class StepPOPolicyLossConfig(PolicyLossConfig):
    """verl's policy-loss settings, with those of `StepPOConfig` that verl has no name for.

    It takes the place of verl's class by
    ``policy_loss._target_=steppo_kernels.integrations.verl.StepPOPolicyLossConfig``. Bounds are the
    actor's `clip_ratio_low` and `clip_ratio_high`, temperatures of the surrogate ``"soft"`` its
    `tau_pos` and `tau_neg`, the reduction is its `loss_agg_mode`, and verl itself adds entropy and
    KL to the loss.

    Attributes:
        ratio: as in `StepPOConfig`; None is that of `loss_mode`: ``"geometric"`` of ``steppo``,
            ``"centered"`` of ``capo``.
        surrogate: as in `StepPOConfig`.
        dual_clip: as in `StepPOConfig`. verl's `clip_ratio_c` plays no part, as in its ``gspo``.
        token_clip: as in `StepPOConfig`.
        log_ratio_max: as in `StepPOConfig`.
        ratio_center: mu of the centered ratio. None is the mean over the call: one micro-batch of
            one rank.
        rows_are_steps: whether each row is one step, also where its mask has gaps. False: every run
            of ones in a row's mask is a step, and a row is a trajectory.

    Raises:
        ValueError, TypeError: naming the setting.

    Example:
        >>> from steppo_kernels.integrations.verl import StepPOPolicyLossConfig
        >>> StepPOPolicyLossConfig(loss_mode="capo").chosen_ratio
        'centered'
        >>> StepPOPolicyLossConfig(loss_mode="steppo", surrogate="tv")
        Traceback (most recent call last):
        ValueError: ratio: got 'geometric' with the surrogate 'tv', expected 'token': it ...
    """

    loss_mode: str = "steppo"
    ratio: RatioKind | None = None
    surrogate: Surrogate = DEFAULT_CONFIG.surrogate
    dual_clip: float | None = DEFAULT_CONFIG.dual_clip
    token_clip: tuple[float, float] | None = DEFAULT_CONFIG.token_clip
    log_ratio_max: float = DEFAULT_CONFIG.log_ratio_max
    ratio_center: float | None = None
    rows_are_steps: bool = True

    def __post_init__(self) -> None:
        one_of("policy_loss.loss_mode", self.loss_mode, tuple(RATIO_OF_MODE))
        if isinstance(self.token_clip, Sequence):
            # A list of YAML. The fields of verl's configurations are frozen.
            object.__setattr__(self, "token_clip", tuple(self.token_clip))
        if not isinstance(self.rows_are_steps, bool):
            raise TypeError(
                f"policy_loss.rows_are_steps: got {type(self.rows_are_steps).__name__}, expected "
                "true or false"
            )
        ratio = self.chosen_ratio
        if self.loss_mode == "capo" and ratio != "centered":
            raise ValueError(
                f"policy_loss.ratio: got {ratio!r} with the loss_mode 'capo', expected 'centered' "
                "or none: use the loss_mode 'steppo' for other ratios"
            )
        if self.ratio_center is not None and ratio != "centered":
            raise ValueError(
                f"policy_loss.ratio_center: got {self.ratio_center!r} with the ratio {ratio!r}, "
                "expected none: it is the center of the ratio 'centered'"
            )
        checks.scalar("policy_loss.ratio_center", self.ratio_center, torch.device("cpu"))
        # Values that mean nothing raise where the configuration is made, in the driver.
        StepPOConfig(**self.family)

    @property
    def chosen_ratio(self) -> RatioKind:
        """The ratio, by itself or by the loss mode."""
        return RATIO_OF_MODE[self.loss_mode] if self.ratio is None else self.ratio

    @property
    def family(self) -> dict[str, Any]:
        """The arguments of `StepPOConfig` among these settings."""
        of_loss = {field.name for field in fields(StepPOConfig)}
        own = (field.name for field in fields(self) if field.name in of_loss)
        return {name: getattr(self, name) for name in own} | {"ratio": self.chosen_ratio}


def settings_of(actor: ActorConfig, mode: str) -> StepPOPolicyLossConfig:
    """Return the settings of a policy loss; the defaults where verl's own class stands.

    Raises:
        ValueError: the settings are those of the other loss.
    """
    given = actor.policy_loss
    if isinstance(given, StepPOPolicyLossConfig):
        if given.loss_mode != mode:
            raise ValueError(
                f"policy_loss.loss_mode: got {given.loss_mode!r} in a call of {mode!r}, expected "
                "settings of the loss that is called"
            )
        return given
    return StepPOPolicyLossConfig(loss_mode=mode)


def bounds_of(actor: ActorConfig) -> tuple[float, float]:
    """Return the lower and the upper bound: the actor's, each `clip_ratio` where it is none."""
    low, high = actor.clip_ratio_low, actor.clip_ratio_high
    return (
        actor.clip_ratio if low is None else low,
        actor.clip_ratio if high is None else high,
    )


def loss_config(
    actor: ActorConfig, settings: StepPOPolicyLossConfig, reduction: Reduction
) -> StepPOConfig:
    """Return the configuration of the loss."""
    if settings.surrogate == "soft":
        of_actor: dict[str, Any] = {"soft_temperature": (actor.tau_pos, actor.tau_neg)}
    else:
        low, high = bounds_of(actor)
        of_actor = {"clip_low": low, "clip_high": high}
    return StepPOConfig(reduction=reduction, **of_actor, **settings.family)
