"""The step objective in compiled code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...outputs import NUM_POLICY_METRICS
from ..records import Steps, record
from .launch import DTYPES, Native, addresses, new_metrics, new_scale, number, scalar_like


def policy_loss(
    native: Native,
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
    steps: Sequence[Tensor],
    config: tuple[float, ...],
    advantages_per_token: bool,
    is_weights_per_token: bool,
    need_grad: bool,
    need_entropy_grad: bool,
) -> tuple[Tensor | None, ...]:
    """Run the operator `policy_loss` of `steppo_kernels.backends.operators`."""
    held = record(Steps, steps)
    loss, metrics = scalar_like(log_probs), new_metrics(log_probs, NUM_POLICY_METRICS)
    gradient_scale = new_scale(native, metrics)
    grad_log_probs = torch.empty_like(log_probs) if need_grad else None
    grad_entropy = torch.empty_like(log_probs) if need_entropy_grad else None
    step_log_ratio = torch.empty_like(held.like_steps[log_probs.dtype])
    tensors = (
        DTYPES[log_probs.dtype],
        *addresses(
            log_probs,
            old_log_probs,
            advantages,
            ref_log_probs,
            entropy,
            is_weights,
            step_weights,
            clip_low,
            clip_high,
        ),
        number(ratio_center, log_probs),
        number(normalizer, log_probs),
        advantages_per_token,
        is_weights_per_token,
        *addresses(loss, metrics, gradient_scale, step_log_ratio, grad_log_probs, grad_entropy),
    )
    native.kernels.policy_loss(tensors, held.fields, config, native.place(log_probs))
    return loss, metrics, step_log_ratio, grad_log_probs, grad_entropy, gradient_scale


def policy_loss_masked(
    native: Native,
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
    config: tuple[float, ...],
    need_grad: bool,
    need_entropy_grad: bool,
) -> tuple[Tensor | None, ...]:
    """Run the operator `policy_loss_masked` of `steppo_kernels.backends.operators`."""
    step_weights = clip_low = clip_high = step_log_ratio = None
    advantages_per_token = is_weights_per_token = True
    loss, metrics = scalar_like(log_probs), new_metrics(log_probs, NUM_POLICY_METRICS)
    gradient_scale = new_scale(native, metrics)
    grad_log_probs = torch.empty_like(log_probs) if need_grad else None
    grad_entropy = torch.empty_like(log_probs) if need_entropy_grad else None
    tensors = (
        DTYPES[log_probs.dtype],
        *addresses(
            log_probs,
            old_log_probs,
            advantages,
            ref_log_probs,
            entropy,
            is_weights,
            step_weights,
            clip_low,
            clip_high,
        ),
        number(ratio_center, log_probs),
        number(normalizer, log_probs),
        advantages_per_token,
        is_weights_per_token,
        *addresses(loss, metrics, gradient_scale, step_log_ratio, grad_log_probs, grad_entropy),
    )
    num_tokens = log_probs.numel()
    native.kernels.policy_loss_masked(
        tensors, (*addresses(mask), num_tokens, row_length), config, native.place(log_probs)
    )
    return loss, metrics, grad_log_probs, grad_entropy, gradient_scale
