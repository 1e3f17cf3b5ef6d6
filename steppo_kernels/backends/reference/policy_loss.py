"""The clipped step objective in plain PyTorch: equations of StepPO (arXiv 2604.18401).

Only action tokens are gathered, so that nothing of a masked token can reach the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import StepPOConfig
from .broadcast import sum_over_steps
from .reductions import reduction_weights


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


def clipped_loss(
    ratio: Tensor, advantages: Tensor, config: StepPOConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return l = max(-A ratio, -A clip(ratio)), bounded by the dual clip where A < 0.

    Returns:
        The loss; whether the clipped branch is strictly larger; whether the loss has a gradient.
        At a tie the unclipped branch keeps its gradient.
    """
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.detach().clamp(1 - config.clip_low, 1 + config.clip_high)
    is_clipped = clipped > unclipped
    active = ~is_clipped & (advantages != 0)
    loss = torch.where(is_clipped, clipped, unclipped)
    if config.dual_clip is not None:
        bound = -config.dual_clip * advantages
        is_bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(is_bounded, bound, loss)
        active &= ~is_bounded
    return loss, is_clipped, active


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    ref_log_probs: Tensor | None,
    entropy: Tensor | None,
    is_weights: Tensor | None,
    step_weights: Tensor | None,
    advantages_per_token: bool,
    is_weights_per_token: bool,
    step_ids: Tensor,
    token_index: Tensor,
    step_offsets: Tensor,
    trajectory_counts: Tensor,
    ratio_center: Tensor | None,
    normalizer: Tensor | None,
    config: StepPOConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss (differentiable), the metric vector and the step log-ratios.

    Arguments are those of the operator `policy_loss` in `steppo_kernels.backends.operators`.
    """
    dtype = log_probs.dtype
    step_of = step_ids[token_index].to(torch.int64)  # [M]
    lengths = step_offsets.diff()  # [S]
    nonempty = lengths > 0
    divisor = lengths.clamp_min(1).to(dtype)
    token_starts = token_index.new_zeros(1).expand_as(lengths)
    if token_index.numel():
        token_starts = token_index[step_offsets[:-1].clamp_max(token_index.numel() - 1)]
    if advantages_per_token:
        advantages = advantages[token_starts] if advantages.numel() else divisor * 0
    advantages = torch.where(nonempty, advantages, torch.zeros_like(divisor))

    def per_step(values: Tensor) -> Tensor:
        """Add up ``[M]`` token values by step."""
        every = torch.arange(values.numel(), device=values.device)
        return sum_over_steps(values, every, step_offsets)

    def per_step_mean(values: Tensor) -> Tensor:
        return per_step(values) / divisor

    def token_mean(values: Tensor) -> Tensor:
        return values.sum() / max(values.numel(), 1)

    # The step log-ratio: log rho = mu + L^-p sum(z - mu).
    new = log_probs[token_index]
    old = new.detach() if old_log_probs is None else old_log_probs[token_index]
    z = new - old
    power = {"geometric": 1.0, "product": 0.0, "centered": 0.5}[config.ratio]
    scale = divisor**-power
    if config.ratio == "centered":
        mu = token_mean(z.detach()) if ratio_center is None else ratio_center.to(z)
        step_log_ratio = torch.where(nonempty, mu + scale * per_step(z - mu), 0.0)
    else:
        step_log_ratio = scale * per_step(z)

    weights, count = reduction_weights(lengths, trajectory_counts, config.reduction, dtype)
    if step_weights is not None:
        weights = torch.where(nonempty, step_weights, 0.0)
    total = count if normalizer is None else normalizer.to(device=count.device, dtype=dtype)

    # What log pi of a token is multiplied by in the gradient, but for 1 / total: first the part of
    # the policy, by step and then by token. A part of 0 is cut off where its graph begins, as a
    # NaN further on would make it one.
    with torch.no_grad():
        ratio = _ratio(step_log_ratio, config.log_ratio_max)
        _, is_clipped, active = clipped_loss(ratio, advantages, config)
        moving = active & ~(step_log_ratio > config.log_ratio_max)
        slope = torch.where(moving, -advantages * ratio, 0.0)
        step_slope = _times(_times(slope, weights), scale)
        if is_weights is not None and not is_weights_per_token:
            step_slope = _times(step_slope, is_weights)
        coefficient = step_slope[step_of]
        if is_weights is not None and is_weights_per_token:
            coefficient = _times(coefficient, is_weights[token_index])

    if is_weights is not None and is_weights_per_token:
        # The token form: each token carries the step's ratio, but a gradient of its own.
        step_part = step_log_ratio.detach()[step_of]
        own_part = torch.where(coefficient != 0, z - z.detach(), 0.0)
        own_part = (scale * divisor)[step_of] * own_part
        token_ratio = _ratio(step_part + own_part, config.log_ratio_max)
        token_loss, *_ = clipped_loss(token_ratio, advantages[step_of], config)
        loss = per_step_mean(token_loss * is_weights[token_index])
    else:
        moved_by = _only(step_log_ratio, step_slope != 0)
        loss, *_ = clipped_loss(_ratio(moved_by, config.log_ratio_max), advantages, config)
        if is_weights is not None:
            loss = loss * is_weights

    kl = entropy_mean = torch.zeros_like(divisor)
    if ref_log_probs is not None:
        ref = ref_log_probs[token_index]
        with torch.no_grad():
            kl_unit = _times(torch.full_like(divisor, config.kl_coef), weights / divisor)
            kl_part = _times(kl_unit[step_of], kl_slope(ref - new, config.kl_estimator))
            coefficient = coefficient + kl_part
        kl = per_step_mean(kl_penalty(ref - _only(new, kl_part != 0), config.kl_estimator))
    is_dead = coefficient == 0
    if entropy is not None:
        entropy_unit = _times(torch.full_like(divisor, config.entropy_coef), weights)
        has_bonus = (entropy_unit != 0)[step_of]
        is_dead &= ~has_bonus
        entropy_mean = per_step_mean(_only(entropy[token_index], has_bonus))

    policy_term, kl_term, entropy_term = (
        (weights * torch.where(nonempty, term, 0.0)).sum() / total
        for term in (loss, kl, entropy_mean)
    )
    objective = policy_term + config.kl_coef * kl_term - config.entropy_coef * entropy_term
    # Without action tokens the graph must still reach the inputs.
    objective = objective + log_probs[:0].sum()
    with torch.no_grad():
        metrics = _metrics(
            (policy_term, kl_term, entropy_term), ratio, is_clipped, advantages, lengths, z, is_dead
        )
    return objective, metrics, step_log_ratio.detach()


def _times(coefficient: Tensor, factor: Tensor) -> Tensor:
    """Return the product; a coefficient of 0 makes it 0, whatever the other factor is."""
    return torch.where(coefficient == 0, 0.0, coefficient * factor)


def _only(values: Tensor, alive: Tensor) -> Tensor:
    """Return the values, with a gradient of exactly 0 where they are not alive."""
    return torch.where(alive, values, values.detach())


def _ratio(log_ratio: Tensor, log_ratio_max: float) -> Tensor:
    """Return e^x with x clamped above, without gradient beyond; a NaN stays one, gradient too."""
    return torch.where(log_ratio > log_ratio_max, log_ratio_max, log_ratio).exp()


def _metrics(
    terms: tuple[Tensor, Tensor, Tensor],
    ratio: Tensor,
    is_clipped: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    z: Tensor,
    dead: Tensor,
) -> Tensor:
    """Return `POLICY_METRICS` as fp64; of no step, ratios are 1 and everything else is 0."""
    nonempty = lengths > 0
    num_steps, num_tokens = nonempty.sum(), lengths.sum()
    ratio = ratio.to(torch.float64)

    def over_steps(values: Tensor) -> Tensor:
        return torch.where(nonempty, values, 0).sum() / num_steps.clamp_min(1)

    def over_tokens(values: Tensor) -> Tensor:
        return values.sum() / num_tokens.clamp_min(1)

    # An entry of 1 stands in where there is no step. A NaN is both the least and the largest.
    lowest, largest = (
        torch.cat(
            (
                torch.where(nonempty, ratio, unseen),
                torch.where(num_steps == 0, 1.0, unseen).to(ratio).reshape(1),
            )
        )
        for unseen in (torch.inf, -torch.inf)
    )
    clipped = is_clipped & nonempty
    values = (
        *terms,
        torch.where(num_steps == 0, 1.0, over_steps(ratio)),
        lowest.amin(),
        largest.amax(),
        over_steps(clipped.to(ratio)),
        over_steps((clipped & (advantages < 0)).to(ratio)),
        over_steps((clipped & (advantages > 0)).to(ratio)),
        over_tokens((clipped * lengths).to(ratio)),
        over_tokens(-z.to(ratio)),
        over_tokens(kl_penalty(z, "k3").to(ratio)),
        over_tokens(dead.to(ratio)),
        num_steps,
        num_tokens,
    )
    return torch.stack([value.to(torch.float64) for value in values])
