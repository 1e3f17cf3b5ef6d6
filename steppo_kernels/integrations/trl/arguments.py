"""What is set for a training."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, field, fields
from typing import Any

from trl import GRPOConfig

from ...config import DEFAULT_CONFIG, StepPOConfig, one_of
from ...losses.gae import step_gae
from ...losses.value_loss import step_value_loss
from . import options

REWARD_SOURCES = ("steps", "final", "both")
SCALES = ("group", "batch", "none")

# Fields of `StepPOConfig` that GRPO has too, and what it calls them. The others have `step_` before
# their name.
_NAMES_OF_GRPO = {
    "clip_low": "epsilon",
    "clip_high": "epsilon_high",
    "kl_coef": "beta",
    "entropy_coef": "entropy_coef",
}
# Ratios of single tokens leave bounds below the first at once, and means over steps never reach
# bounds above the second.
_NARROW, _WIDE = 0.01, 0.1


def _default(function: Any, name: str) -> Any:
    """Return the default of an argument of a public function."""
    return inspect.signature(function).parameters[name].default


def _list(values: tuple[float, ...] | None) -> list[float] | None:
    """Return a tuple as what a command line can say."""
    return None if values is None else list(values)


def argument_of(name: str) -> str:
    """Return the argument that sets a field of `StepPOConfig`."""
    return _NAMES_OF_GRPO.get(name, f"step_{name}")


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class StepPOTrainingArguments(GRPOConfig):
    """Arguments of a `StepPOTrainer`: those of TRL's `GRPOConfig`, and those of steps.

    The fields of `StepPOConfig` have `step_` before their name, but for those that GRPO has:
    `epsilon` is `clip_low`, `epsilon_high` is `clip_high`, `beta` is `kl_coef`, and `entropy_coef`
    has its name. Options of GRPO that only GRPO's own loss reads raise unless they have their
    defaults.

    Attributes:
        epsilon: `clip_low` of `StepPOConfig`, whose default it has.
        epsilon_high: `clip_high`. None is the default of `StepPOConfig` if `epsilon` has its own,
            else `epsilon`, as in GRPO.
        scale_rewards: ``"group"`` divides advantages by the standard deviation of their group,
            ``"batch"`` by that of the batch, ``"none"`` by nothing; before that, the mean of the
            group is subtracted. With a critic there is no group: ``"batch"`` whitens over the
            batch, and ``"none"`` leaves the advantages. None is ``"group"``, or with a critic
            ``"batch"``.
        step_ratio: as `ratio` of `StepPOConfig`.
        step_surrogate: as `surrogate` of `StepPOConfig`.
        step_reduction: as `reduction` of `StepPOConfig`.
        step_dual_clip: as `dual_clip` of `StepPOConfig`.
        step_token_clip: as `token_clip` of `StepPOConfig`, two numbers.
        step_soft_temperature: as `soft_temperature` of `StepPOConfig`, two numbers.
        step_log_ratio_max: as `log_ratio_max` of `StepPOConfig`.
        step_kl_estimator: as `kl_estimator` of `StepPOConfig`.
        step_reward_source: ``"steps"``: rewards of steps, from the `step_rewards` that a rollout
            returns or that an environment holds; reward functions are then only logged.
            ``"final"``: the reward of the completion, from reward functions, at its last step.
            ``"both"``: the sum of these.
        step_gamma: discount factor per step.
        step_fused: True has the patched model compute the loss without logits. False takes TRL's
            log-probs. None is True, unless the head of the model cannot be patched.
        step_critic: trains a value head, and takes step-level GAE in the place of the group.
        step_lam: GAE factor per step.
        step_value_clip: as `clip` of `step_value_loss`.
        step_value_coef: weight of the value loss.
        step_value_trains_body: whether the value loss trains the body of the model, beside the
            value head.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> arguments = StepPOTrainingArguments("out", use_cpu=True, bf16=False, step_gamma=0.9)
        >>> arguments.step_config.ratio, arguments.step_config.clip_low, arguments.scale_rewards
        ('geometric', 0.0003, 'group')
        >>> StepPOTrainingArguments("out", use_cpu=True, bf16=False, loss_type="grpo")
        Traceback (most recent call last):
        ValueError: loss_type: got 'grpo', expected the default 'dapo': the loss is ...
    """

    epsilon: float = _field(DEFAULT_CONFIG.clip_low, "Lower bound of the surrogate.")
    epsilon_high: float | None = _field(None, "Upper bound of the surrogate.")
    scale_rewards: str | None = _field(None, "What advantages are divided by.")
    # TRL's default multiplies the KL penalty by a ratio, which this loss does not.
    use_bias_correction_kl: bool = _field(False, "Not supported.")

    step_ratio: str = _field(DEFAULT_CONFIG.ratio, "How the ratio of a step is formed.")
    step_surrogate: str = _field(DEFAULT_CONFIG.surrogate, "What bounds the ratio.")
    step_reduction: str = _field(DEFAULT_CONFIG.reduction, "What steps weigh.")
    step_dual_clip: float | None = _field(
        DEFAULT_CONFIG.dual_clip, "Bounds the loss of steps with a negative advantage."
    )
    step_token_clip: list[float] | None = field(
        default_factory=lambda: _list(DEFAULT_CONFIG.token_clip),
        metadata={"help": "Bounds of the log-ratios of tokens before they are pooled."},
    )
    step_soft_temperature: list[float] = field(
        default_factory=lambda: list(DEFAULT_CONFIG.soft_temperature),
        metadata={"help": "Temperatures of the surrogate 'soft'."},
    )
    step_log_ratio_max: float = _field(
        DEFAULT_CONFIG.log_ratio_max, "Upper bound of the log-ratio."
    )
    step_kl_estimator: str = _field(DEFAULT_CONFIG.kl_estimator, "Estimator of the KL penalty.")

    step_reward_source: str = _field("steps", "Where the rewards of steps come from.")
    step_gamma: float = _field(_default(step_gae, "gamma"), "Discount factor per step.")
    step_fused: bool | None = _field(None, "Whether the patched model computes the loss.")

    step_critic: bool = _field(False, "Whether a value head is trained.")
    step_lam: float = _field(_default(step_gae, "lam"), "GAE factor per step.")
    step_value_clip: float = _field(_default(step_value_loss, "clip"), "Clip of the value loss.")
    step_value_coef: float = _field(0.1, "Weight of the value loss.")
    step_value_trains_body: bool = _field(True, "Whether the value loss trains the body.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon_high is None:
            is_default = self.epsilon == DEFAULT_CONFIG.clip_low
            self.epsilon_high = DEFAULT_CONFIG.clip_high if is_default else self.epsilon
        if self.scale_rewards is None:
            self.scale_rewards = "batch" if self.step_critic else "group"
        self.check()
        _warn_of_bounds(self.step_config)

    def check(self) -> None:
        """Raise for arguments that mean nothing together, or that would be lost."""
        options.refuse_lost(self)
        one_of("step_reward_source", self.step_reward_source, REWARD_SOURCES)
        one_of("scale_rewards", self.scale_rewards, SCALES)
        for name in ("step_gamma", "step_lam"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}: got {value!r}, expected a number in [0, 1]")
        if not self.step_value_coef > 0:
            raise ValueError(
                f"step_value_coef: got {self.step_value_coef!r}, expected a number above 0"
            )
        if self.step_critic and self.scale_rewards == "group":
            raise ValueError(
                "scale_rewards: got 'group' with step_critic, expected 'batch' or 'none': the "
                "critic takes the place of the group"
            )
        if self.reward_weights is not None and self.step_reward_source == "steps":
            raise ValueError(
                f"reward_weights: got {self.reward_weights!r} with step_reward_source='steps', "
                "expected None: reward functions are only logged then; 'final' and 'both' use them"
            )
        # Built once more where it is used; here it checks its numbers.
        _ = self.step_config
        if not self.step_critic:
            _refuse_without_critic(self)

    @property
    def step_config(self) -> StepPOConfig:
        """The `StepPOConfig` of the loss."""
        given = {one.name: getattr(self, argument_of(one.name)) for one in fields(StepPOConfig)}
        for name, value in given.items():
            # A list is what a command line makes of several numbers.
            if isinstance(value, list):
                given[name] = tuple(value)
        try:
            return StepPOConfig(**given)
        except (TypeError, ValueError) as error:
            name, colon, text = str(error).partition(":")
            # The name of the argument that was set, where it has another one.
            said = f"{argument_of(name)}{colon}{text}" if name in given else str(error)
            raise type(error)(said) from error


def _refuse_without_critic(args: StepPOTrainingArguments) -> None:
    """Raise for arguments of the critic where there is none."""
    for one in fields(args):
        if one.name in ("step_lam",) or one.name.startswith("step_value_"):
            value = getattr(args, one.name)
            if value != one.default:
                raise ValueError(
                    f"{one.name}: got {value!r} without step_critic, expected the default "
                    f"{one.default!r}: it is an argument of the critic"
                )


def _warn_of_bounds(config: StepPOConfig) -> None:
    """Warn where the bounds are those of the other kind of ratio."""
    bounds = (config.clip_low, config.clip_high)
    if config.surrogate in ("soft", "tv"):
        return
    if config.ratio == "token" and 0.0 < max(bounds) < _NARROW:
        warnings.warn(
            f"epsilon, epsilon_high: got {bounds} with step_ratio='token', expected about 0.2: "
            "ratios of single tokens leave so narrow bounds at once, and have no gradient then",
            stacklevel=4,
        )
    if config.ratio == "geometric" and min(bounds) > _WIDE:
        warnings.warn(
            f"epsilon, epsilon_high: got {bounds} with step_ratio='geometric', expected about "
            f"{(DEFAULT_CONFIG.clip_low, DEFAULT_CONFIG.clip_high)}: means over a step hardly ever "
            "leave so wide bounds",
            stacklevel=4,
        )
