"""The step objective in plain PyTorch: equations of StepPO (arXiv 2604.18401) and its family.

Only action tokens are gathered, so that nothing of a masked token can reach the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import StepPOConfig
from ..records import Steps
from .broadcast import sum_over_steps
from .reductions import denominator, reduction_weights
from .surrogates import capped_ratio, moved_by, surrogate

# The gradient of a log-ratio by the log-prob of a token of its step is L^-p.
_POWERS = {"geometric": 1.0, "product": 0.0, "centered": 0.5, "token": 1.0}


class _Tokens:
    """The action tokens, step by step ``[M]``, and what moves numbers between them and steps."""

    def __init__(self, steps: Steps, dtype: torch.dtype) -> None:
        self.index, self.offsets = steps.token_index, steps.step_offsets
        self.step_of = steps.step_ids.reshape(-1)[self.index].to(torch.int64)
        self.lengths = self.offsets.diff()
        self.nonempty = self.lengths > 0
        self.divisor = self.lengths.clamp_min(1).to(dtype)

    def gather(self, values: Tensor) -> Tensor:
        """Take action tokens from N values of any shape."""
        return values.reshape(-1)[self.index]

    def spread(self, per_step: Tensor) -> Tensor:
        """Give each token the entry of its step: ``[S]`` to ``[M]``."""
        return per_step[self.step_of]

    def sum(self, values: Tensor) -> Tensor:
        """Add up by step: ``[M]`` to ``[S]``."""
        every = torch.arange(values.numel(), device=values.device)
        return sum_over_steps(values, every, self.offsets)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the tokens of each step, 0 of none."""
        return self.sum(values) / self.divisor


def kl_penalty(d: Tensor, estimator: str) -> Tensor:
    """Return the KL estimate of each token from d = log pi_ref - log pi.

    d is clamped to +-20 and the value to +-10, the bounds of verl's ``low_var_kl``.
    """
    return _clamp(_kl_value(_clamp(d, 20.0), estimator), 10.0)


def kl_slope(d: Tensor, estimator: str) -> Tensor:
    """Return the derivative of `kl_penalty` with respect to log pi = log pi_ref - d."""
    slope = {"k1": torch.ones_like(d), "k2": -d, "k3": -torch.expm1(d)}[estimator]
    is_clamped = (d.abs() > 20.0) | (_kl_value(d, estimator).abs() > 10.0)
    return torch.where(is_clamped, 0.0, slope)


def _clamp(x: Tensor, bound: float) -> Tensor:
    """Return x within +-bound, without gradient beyond; a NaN stays one, gradient too."""
    return torch.where(x > bound, bound, torch.where(x < -bound, -bound, x))


def _kl_value(d: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d * d
    far = torch.expm1(d) - d
    if d.dtype != torch.float64:
        return far
    # The difference cancels around 0, where its series is d^2/2 (1 + d/3 (1 + d/4 (...))).
    near = torch.ones_like(d)
    for k in range(18, 2, -1):
        near = 1 + d / k * near
    return torch.where(d.abs() > 0.5, far, 0.5 * d * d * near)


def policy_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    ref_log_probs: Tensor | None,
    is_weights: Tensor | None,
    step_weights: Tensor | None,
    clip_low: Tensor | None,
    clip_high: Tensor | None,
    ratio_center: Tensor | None,
    normalizer: Tensor | None,
    steps: Steps,
    config: StepPOConfig,
    advantages_per_token: bool,
    is_weights_per_token: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss (differentiable), the metric vector and the step log-ratios.

    Arguments are those of the operator `policy_loss` in `steppo_kernels.backends.operators`, but
    for the config. A unit is a step where all that its loss depends on is one number a step, else a
    token.
    """
    tokens = _Tokens(steps, log_probs.dtype)
    nonempty, divisor = tokens.nonempty, tokens.divisor
    has_token_ratio = config.ratio == "token"
    by_token = has_token_ratio or advantages_per_token or is_weights_per_token

    def at_units(values: Tensor, per_token: bool = False) -> Tensor:
        if by_token:
            return tokens.gather(values) if per_token else tokens.spread(values)
        # An empty step may hold anything.
        return torch.where(nonempty, values, 0.0)

    def on_tokens(values: Tensor) -> Tensor:
        return values if by_token else tokens.spread(values)

    unit_advantages = at_units(advantages, advantages_per_token)
    low = config.clip_low if clip_low is None else at_units(clip_low)
    high = config.clip_high if clip_high is None else at_units(clip_high)
    unit_is_weights = None if is_weights is None else at_units(is_weights, is_weights_per_token)
    weights, count = reduction_weights(
        tokens.lengths, steps.trajectory_counts, config.reduction, log_probs.dtype
    )
    if step_weights is not None:
        weights = torch.where(nonempty, step_weights, 0.0)
    total = count if normalizer is None else normalizer.to(count)

    new = tokens.gather(log_probs)
    old = new.detach() if old_log_probs is None else tokens.gather(old_log_probs)
    raw = new - old
    z, is_bitten = clip_tokens(raw, on_tokens(unit_advantages), config.token_clip)
    gap = new.detach().exp() - old.exp() if config.surrogate == "tv" else None
    share = divisor ** -_POWERS[config.ratio]
    step_log_ratio = _pooled(z, tokens, share, ratio_center, config.ratio)

    # What log pi of a token is multiplied by in the gradient, but for 1 / total: first the part of
    # the policy. A part of 0 is cut off where its graph begins, as a NaN further on would make it
    # one.
    with torch.no_grad():
        x = z if has_token_ratio else at_units(step_log_ratio)
        _, slope, is_clipped = surrogate(x, unit_advantages, low, high, config, gap)
        unit_part = _times(slope, at_units(weights * share))
        if unit_is_weights is not None:
            unit_part = _times(unit_part, unit_is_weights)
        coefficient = torch.where(is_bitten, 0.0, on_tokens(unit_part))

    if not by_token:
        moved = _only(step_log_ratio, unit_part != 0)
    elif has_token_ratio:
        moved = _only(z, coefficient != 0)
    else:
        # Each token carries the ratio of its step, but a gradient of its own. The mean over the
        # step divides that by L.
        own = torch.where(coefficient != 0, tokens.spread(share * divisor), 0.0)
        moved = moved_by(z, x, own)
    loss, *_ = surrogate(moved, unit_advantages, low, high, config, gap)
    if unit_is_weights is not None:
        loss = loss * unit_is_weights
    if by_token:
        loss = tokens.mean(loss)

    kl = entropy_mean = torch.zeros_like(divisor)
    if ref_log_probs is not None:
        ref = tokens.gather(ref_log_probs)
        with torch.no_grad():
            kl_unit = _times(torch.full_like(divisor, config.kl_coef), weights / divisor)
            kl_part = _times(tokens.spread(kl_unit), kl_slope(ref - new, config.kl_estimator))
            coefficient = coefficient + kl_part
        kl = tokens.mean(kl_penalty(ref - _only(new, kl_part != 0), config.kl_estimator))
    is_dead = coefficient == 0
    if entropy is not None:
        entropy_unit = _times(torch.full_like(divisor, config.entropy_coef), weights)
        has_bonus = tokens.spread(entropy_unit != 0)
        is_dead &= ~has_bonus
        entropy_mean = tokens.mean(_only(tokens.gather(entropy), has_bonus))

    policy_term, kl_term, entropy_term = (
        (weights * torch.where(nonempty, term, 0.0)).sum() / total
        for term in (loss, kl, entropy_mean)
    )
    objective = policy_term + config.kl_coef * kl_term - config.entropy_coef * entropy_term
    # Without action tokens the graph must still reach the inputs.
    objective = objective + log_probs.reshape(-1)[:0].sum()
    with torch.no_grad():
        ratio = capped_ratio(z if has_token_ratio else step_log_ratio, config.log_ratio_max)
        metrics = _metrics(
            (policy_term, kl_term, entropy_term),
            denominator(tokens.lengths, count, config.reduction, normalizer),
            tokens,
            ratio if has_token_ratio else tokens.spread(ratio),
            tokens.mean(ratio) if has_token_ratio else ratio,
            on_tokens(is_clipped),
            raw,
            is_dead,
        )
    return objective, metrics, step_log_ratio.detach()


def clip_tokens(
    z: Tensor, advantages: Tensor, bounds: tuple[float, float] | None
) -> tuple[Tensor, Tensor]:
    """Return log-ratios clamped on the side of their advantage (GMPO), and where that bites."""
    if bounds is None:
        return z, torch.zeros_like(z, dtype=torch.bool)
    low, high = bounds
    is_above = (advantages >= 0) & (z > high)
    is_below = (advantages < 0) & (z < -low)
    return torch.where(is_above, high, torch.where(is_below, -low, z)), is_above | is_below


def _pooled(
    z: Tensor, tokens: _Tokens, share: Tensor, ratio_center: Tensor | None, ratio: str
) -> Tensor:
    """Return the log-ratio of each step: mu + L^-p sum(z - mu), 0 of an empty one."""
    if ratio != "centered":
        return share * tokens.sum(z)
    mu = z.detach().sum() / max(z.numel(), 1) if ratio_center is None else ratio_center.to(z)
    return torch.where(tokens.nonempty, mu + share * tokens.sum(z - mu), 0.0)


def _times(coefficient: Tensor, factor: Tensor) -> Tensor:
    """Return the product; a coefficient of 0 makes it 0, whatever the other factor is."""
    return torch.where(coefficient == 0, 0.0, coefficient * factor)


def _only(values: Tensor, alive: Tensor) -> Tensor:
    """Return the values, with a gradient of exactly 0 where they are not alive."""
    return torch.where(alive, values, values.detach())


def _metrics(
    terms: tuple[Tensor, Tensor, Tensor],
    divided_by: Tensor,
    tokens: _Tokens,
    ratio: Tensor,
    step_ratio: Tensor,
    is_clipped: Tensor,
    z: Tensor,
    is_dead: Tensor,
) -> Tensor:
    """Return `POLICY_METRICS` and the hidden entries as fp64; of no step, ratios are 1, others 0.

    All are per token but `step_ratio`, the ratio of a step or the mean of those of its tokens.
    """
    num_steps, num_tokens = tokens.nonempty.sum(), z.numel()

    def over_steps(values: Tensor) -> Tensor:
        return torch.where(tokens.nonempty, values, 0).sum() / num_steps.clamp_min(1)

    def over_tokens(values: Tensor) -> Tensor:
        return values.to(torch.float64).sum() / max(num_tokens, 1)

    def clip_fraction(flags: Tensor) -> Tensor:
        return over_steps(tokens.sum(flags.to(torch.float64)) / tokens.divisor)

    one = torch.ones_like(num_steps)
    has_steps = num_tokens > 0
    is_low = ratio < 1
    values = (
        *terms,
        over_steps(step_ratio.to(torch.float64)) if has_steps else one,
        # A NaN is both the least and the largest.
        ratio.amin() if has_steps else one,
        ratio.amax() if has_steps else one,
        clip_fraction(is_clipped),
        clip_fraction(is_clipped & is_low),
        clip_fraction(is_clipped & ~is_low),
        over_tokens(is_clipped),
        over_tokens(-z),
        over_tokens(kl_penalty(z, "k3")),
        over_tokens(is_dead),
        num_steps,
        one * num_tokens,
        divided_by,
    )
    return torch.stack([value.to(torch.float64) for value in values])
