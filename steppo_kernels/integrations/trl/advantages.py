"""Advantages of the steps of a generation, with and without a critic."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...losses.gae import step_gae
from ...losses.group_normalize import group_normalize
from ...losses.returns import step_returns
from ...outputs import StepAdvantages
from .arguments import StepPOTrainingArguments
from .samples import StepSamples

AdvantageFunction = Callable[[StepSamples], Tensor]

# TRL divides by a standard deviation and this.
_EPS = 1e-4


def without_critic(samples: StepSamples, args: StepPOTrainingArguments) -> Tensor:
    """Return the discounted returns of steps, normalized over their group: ``[S]``.

    Each step of a group counts once. With ``scale_rewards="batch"`` the standard deviation is that
    of all returns, as TRL has it for rewards.
    """
    returns = step_returns(samples.rewards, samples.layout, gamma=args.step_gamma)
    by_group = args.scale_rewards == "group"
    found = group_normalize(returns, samples.groups, layout=samples.layout, std=by_group, eps=_EPS)
    if args.scale_rewards == "batch" and len(returns) > 1:
        found = found / (returns.std() + _EPS)
    return found


def with_critic(samples: StepSamples, args: StepPOTrainingArguments) -> StepAdvantages:
    """Return step-level GAE and the returns that values are trained on."""
    assert samples.values is not None
    return step_gae(
        samples.rewards,
        samples.values,
        samples.layout,
        gamma=args.step_gamma,
        lam=args.step_lam,
        whiten=args.scale_rewards == "batch",
    )


def advantages_of(
    samples: StepSamples, args: StepPOTrainingArguments, function: AdvantageFunction | None
) -> StepAdvantages:
    """Return the advantages of all ranks' steps, and their returns where there is a critic.

    Raises:
        ValueError, TypeError: a `function` of the user's returned something else.
    """
    if args.step_critic:
        found = with_critic(samples, args)
    else:
        none = samples.rewards[:0]
        found = StepAdvantages(none, none)
    if function is None:
        advantages = found.advantages if args.step_critic else without_critic(samples, args)
    else:
        advantages = _checked(function(samples), samples)
    return StepAdvantages(advantages.to(samples.rewards), found.returns)


def _checked(given: object, samples: StepSamples) -> Tensor:
    """Return what a function of the user's returned, if it is one number for each step."""
    expected = samples.rewards.shape
    if not isinstance(given, Tensor):
        raise TypeError(
            f"advantage_func: got {type(given).__name__}, expected a tensor of shape "
            f"{tuple(expected)}, one number for each step"
        )
    if given.shape != expected:
        raise ValueError(
            f"advantage_func: got shape {tuple(given.shape)}, expected {tuple(expected)}, one "
            "number for each step"
        )
    if not bool(given.isfinite().all()):
        raise ValueError("advantage_func: got numbers that are not finite, expected finite ones")
    return given.detach()
