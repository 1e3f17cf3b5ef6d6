"""Inputs of the suites: log-probs of batches of trajectories, with their steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import steppo_kernels as sk

# The width of the band around the clip bounds in which fp32 and fp64 may decide differently.
_CLIP_MARGIN = 1e-6


@dataclass(frozen=True, eq=False)
class Objective:
    """What `steppo_loss` is asked for.

    Attributes:
        suite: the name of its suite.
        settings: arguments of `StepPOConfig`.
        noise: standard deviation of the log-ratios, those of one optimizer step at these bounds.
        varying: whether advantages vary within a step.
    """

    suite: str
    settings: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.01
    varying: bool = False

    @functools.cached_property
    def config(self) -> sk.StepPOConfig:
        """The configuration."""
        return sk.StepPOConfig(**self.settings)


STEP = Objective("policy_loss")
# PPO, GRPO and DAPO; step advantages make it GiGPO.
TOKEN = Objective(
    "token_loss",
    {"ratio": "token", "clip_low": 0.2, "clip_high": 0.28, "reduction": "token_mean"},
    noise=0.1,
)
GSPO_TOKEN = Objective("token_advantages", varying=True)


@dataclass(frozen=True)
class PolicyCase:
    """Inputs of `steppo_loss`.

    `advantages` are per step, or per token if they vary in a step; `token_advantages` are the same
    per token.
    """

    objective: Objective
    mask: Tensor
    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    token_advantages: Tensor
    layout: sk.StepLayout

    @property
    def tokens(self) -> int:
        """All positions, masked ones included."""
        return self.mask.numel()

    def bytes_to_touch(self, *, with_layout: bool) -> int:
        """Return what one forward + backward has to move at least.

        Counted once each: log-probs and old log-probs of the action tokens (fp32), the advantage
        of each step, or of each action token if it varies, the arrays that say which tokens those
        are, and the gradient of every token (fp32, written). The arrays are the step offsets of the
        layout and the token index of each step's first and last token, int64 (steps lie in one
        piece here), or the mask, one byte a token. Intermediate passes, metrics and whatever else a
        variant reads or writes do not count, so this is the same number for all variants of a case.
        """
        action, steps = self.layout.num_tokens, self.layout.num_steps
        where = 8 * (steps + 1) + 16 * steps if with_layout else self.tokens
        advantages = action if self.objective.varying else steps
        return 4 * (2 * action + advantages + self.tokens) + where


def rows_mask(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Return right-padded responses of 32 to `length` tokens, one step a row."""
    sizes = torch.randint(32, length + 1, (rows, 1), generator=generator)
    return torch.arange(length) < sizes


def turns_mask(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Return multi-turn rows: actions of about 47 tokens, 24 % of all, between observations."""
    mean_action, share = 47.0, 0.24
    mean_observation = mean_action * (1 - share) / share
    pairs = int(2.5 * length / (mean_action + mean_observation)) + 8

    def sizes(mean: float) -> Tensor:
        uniform = torch.rand((rows, pairs), generator=generator).clamp_min(1e-6)
        # Rounding down takes half a token off on average.
        return 1 + (-(mean - 0.5) * uniform.log()).to(torch.int64)

    observations, actions = sizes(mean_observation), sizes(mean_action)
    # The rows begin anywhere in their first observation.
    observations[:, 0] = observations[:, 0] // 2
    starts = (observations + actions).cumsum(1) - actions
    # Between a start and the end that follows it, one more start than ends has been passed.
    change = torch.zeros((rows, length + 1), dtype=torch.int32)
    one = torch.ones_like(starts, dtype=torch.int32)
    change.scatter_add_(1, starts.clamp_max(length), one)
    change.scatter_add_(1, (starts + actions).clamp_max(length), -one)
    return change.cumsum(1)[:, :length] > 0


def policy_case(case: str, objective: Objective = STEP) -> PolicyCase:
    """Return the inputs of a case: ``rows`` or ``turns``, then the shape, as in ``rows 64x8192``.

    No step (or token, where these have ratios of their own) lies within `_CLIP_MARGIN` of a clip
    bound, where the last bit of a sum would decide which branch it takes.
    """
    return _policy_case(case, objective)


@functools.cache
def _policy_case(case: str, objective: Objective) -> PolicyCase:
    kind, rows, length = _parse(case)
    generator = torch.Generator().manual_seed(0)
    make = rows_mask if kind == "rows" else turns_mask
    mask = make(rows, length, generator)
    layout = sk.StepLayout.from_mask(mask)
    old = -torch.rand(mask.shape, generator=generator) - 0.01
    new = old + objective.noise * torch.randn(mask.shape, generator=generator)
    z = (new - old).double()
    if objective.config.ratio == "token":
        close = _is_close(z, objective.config) & mask
    else:
        of_steps = z.view(-1)[layout.token_index]
        mean = torch.segment_reduce(of_steps, "mean", offsets=layout.step_offsets)
        close = sk.broadcast_to_tokens(_is_close(mean, objective.config).float(), layout)
    new += 1e-4 * close
    advantages = torch.randn(layout.num_steps, generator=generator)
    token_advantages = sk.broadcast_to_tokens(advantages, layout)
    if objective.varying:
        advantages = token_advantages = torch.randn(mask.shape, generator=generator)
    return PolicyCase(
        objective=objective,
        mask=mask,
        log_probs=new.requires_grad_(),
        old_log_probs=old,
        advantages=advantages,
        token_advantages=token_advantages,
        layout=layout,
    )


def _is_close(log_ratio: Tensor, config: sk.StepPOConfig) -> Tensor:
    ratio = log_ratio.exp()
    low, high = 1 - config.clip_low, 1 + config.clip_high
    return ((ratio - low).abs() < _CLIP_MARGIN) | ((ratio - high).abs() < _CLIP_MARGIN)


def _parse(case: str) -> tuple[str, int, int]:
    kind, shape = case.split(" ")
    rows, length = shape.split("x")
    return kind, int(rows), int(length)


def policy_step(
    case: PolicyCase, loss: Callable[[], Tensor]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return one forward + backward of `loss`, and what resets the gradient before it."""

    def step() -> None:
        loss().backward()

    def reset() -> None:
        case.log_probs.grad = None

    return step, reset
