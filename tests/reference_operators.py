"""The operators whose reference autograd differentiates, as launchers made of that reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kept_reference
import torch
from torch import Tensor

from steppo_kernels import StepLayout, StepPOConfig
from steppo_kernels.backends.reference import policy_loss, token_log_probs, value_loss
from steppo_kernels.config import (
    KL_ESTIMATORS,
    RATIOS,
    REDUCTIONS,
    SURROGATES,
    KernelConfig,
)
from steppo_kernels.layout.step_layout import require_layout


def _policy_loss(
    log_probs: Tensor, entropy: Tensor | None, *args: Any
) -> tuple[Tensor | None, ...]:
    """The operator `policy_loss`, by autograd over the reference."""
    *rest, config, advantages_per_token, is_weights_per_token, need_grad, need_entropy = args
    with torch.enable_grad():
        new = log_probs.detach().requires_grad_()
        bonus = None if entropy is None else entropy.detach().requires_grad_()
        loss, metrics, log_ratio = policy_loss.policy_loss(
            new, bonus, *rest, _config(config), advantages_per_token, is_weights_per_token
        )
        grad = torch.autograd.grad(loss, new, retain_graph=True)[0] if need_grad else None
        other = torch.autograd.grad(loss, bonus)[0] if need_entropy else None
    return loss.detach(), metrics, log_ratio, grad, other, None


def _config(numbers: tuple[float, ...]) -> StepPOConfig:
    c = KernelConfig(*numbers)
    soft = SURROGATES[int(c.surrogate)] == "soft"
    return StepPOConfig(
        ratio=RATIOS[int(c.ratio)],
        surrogate=SURROGATES[int(c.surrogate)],
        clip_low=c.clip_low,
        clip_high=c.clip_high,
        dual_clip=c.dual_clip or None,
        token_clip=(c.token_clip_low, c.token_clip_high) if c.clips_tokens else None,
        soft_temperature=(c.soft_positive, c.soft_negative) if soft else (1.0, 1.05),
        log_ratio_max=c.log_ratio_max,
        reduction=REDUCTIONS[int(c.reduction)],
        kl_coef=c.kl_coef,
        kl_estimator=KL_ESTIMATORS[int(c.kl_estimator)],
        entropy_coef=c.entropy_coef,
    )


def _policy_loss_masked(
    log_probs: Tensor,
    entropy: Tensor | None,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    ref_log_probs: Tensor | None,
    is_weights: Tensor | None,
    ratio_center: Tensor | None,
    normalizer: Tensor | None,
    mask: Tensor,
    row_length: int,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    shape = (-1, row_length) if row_length else (0, 0)
    layout = StepLayout.from_mask(mask.view(shape), backend="reference")
    config, *needs = rest
    loss, metrics, _, *grads = _policy_loss(
        log_probs,
        entropy,
        old_log_probs,
        advantages,
        ref_log_probs,
        is_weights,
        None,
        None,
        None,
        ratio_center,
        normalizer,
        require_layout(layout).steps,
        config,
        True,
        True,
        *needs,
    )
    return loss, metrics, *grads


def _value_loss(values: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    *given, (clip, reduction), values_per_token, returns_per_token, old_per_token, need_grad = args
    with torch.enable_grad():
        leaf = values.detach().requires_grad_()
        loss, metrics = value_loss.value_loss(
            leaf,
            *given,
            clip,
            REDUCTIONS[int(reduction)],
            values_per_token,
            returns_per_token,
            old_per_token,
        )
        grad = torch.autograd.grad(loss, leaf)[0] if need_grad else None
    return loss.detach(), metrics, grad, None


def _token_log_probs(
    logits, token_ids, mask, temperatures, temperature, softcap, need_entropy
) -> tuple[Tensor, ...]:
    z = _scaled(logits, temperatures, temperature)
    rows = _rows(mask, token_ids)
    found = token_log_probs.token_log_probs(z, token_ids, rows, 1.0, softcap, z.dtype)
    top = z.double().amax(-1)
    log_sum = torch.logsumexp(z.double(), -1) - top
    return found[0], found[1] if need_entropy else found[1][:0], top, log_sum


def _token_log_probs_backward(
    out,
    logits,
    token_ids,
    mask,
    temperatures,
    temperature,
    softcap,
    top,
    log_sum,
    entropy,
    grad,
    grad_entropy,
    rows,
) -> None:
    leaf = logits.detach().clone().requires_grad_()
    with torch.enable_grad():
        z = _scaled(leaf, temperatures, temperature)
        used = _rows(mask, token_ids)
        one, other = token_log_probs.token_log_probs(z, token_ids, used, 1.0, softcap, z.dtype)
        total = (
            (one * grad).sum()
            if grad_entropy is None
            else ((one * grad + other * grad_entropy).sum())
        )
        (found,) = torch.autograd.grad(total, leaf)
    found = found.reshape(-1, found.shape[-1]).to(out.dtype)
    if rows is None:
        out.copy_(found.view(out.shape))
    else:
        out[0, : len(rows)] = found[rows]


def _scaled(logits, temperatures, temperature) -> Tensor:
    z = logits.reshape(-1, logits.shape[-1])
    z = z.to(torch.float64 if z.dtype == torch.float64 else torch.float32)
    return z / (temperature if temperatures is None else temperatures[:, None].to(z.dtype))


def _rows(mask, token_ids) -> Tensor:
    return torch.arange(len(token_ids)) if mask is None else mask.nonzero().squeeze(1)


def _head_logits(logits, hidden, weight, bias) -> None:
    found = hidden.to(logits.dtype) @ weight.to(logits.dtype).t()
    logits.copy_(found if bias is None else found + bias)


def _accumulate(total, product, is_first) -> None:
    total.copy_(product if is_first else total + product)


OPERATORS: dict[str, Callable[..., Any]] = {
    "policy_loss": _policy_loss,
    "policy_loss_masked": _policy_loss_masked,
    "value_loss": _value_loss,
    "token_log_probs": _token_log_probs,
    "token_log_probs_backward": _token_log_probs_backward,
    "head_logits": _head_logits,
    "accumulate": _accumulate,
    "kept_logits": kept_reference.kept_logits,
    "kept_directions": kept_reference.kept_directions,
    "scale_directions": kept_reference.scale_directions,
    "kept_hidden_gradient": kept_reference.kept_hidden_gradient,
    "kept_weight_gradient": kept_reference.kept_weight_gradient,
    "kept_log_probs": kept_reference.kept_log_probs,
    "kept_log_probs_backward": kept_reference.kept_log_probs_backward,
}
