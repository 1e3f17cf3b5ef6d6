"""The clipped step objective in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...outputs import POLICY_METRICS
from .launch import dtype_code, empty, kernels, pointer, threads


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
    *scalars: Any,
) -> tuple[Tensor, ...]:
    """Run the operator `policy_loss` of `steppo_kernels.backends.operators`."""
    *config, need_grad, need_entropy_grad = scalars
    outputs = _outputs(log_probs, need_grad, need_entropy_grad)
    loss, metrics, grad, grad_entropy, grad_scale = outputs
    num_steps = step_offsets.numel() - 1
    step_log_ratio = log_probs.new_empty(num_steps)
    kernels.policy_loss(
        dtype_code(log_probs),
        pointer(log_probs),
        pointer(old_log_probs),
        pointer(advantages),
        pointer(ref_log_probs),
        pointer(entropy),
        pointer(is_weights),
        pointer(step_weights),
        advantages_per_token,
        is_weights_per_token,
        pointer(token_index),
        pointer(step_offsets),
        pointer(trajectory_counts),
        pointer(ratio_center),
        pointer(normalizer),
        *config,
        log_probs.numel(),
        num_steps,
        pointer(loss),
        pointer(metrics),
        pointer(step_log_ratio),
        pointer(grad),
        pointer(grad_entropy),
        pointer(grad_scale),
        threads(),
    )
    return loss, metrics, step_log_ratio, grad, grad_entropy, grad_scale


def policy_loss_masked(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    ref_log_probs: Tensor | None,
    entropy: Tensor | None,
    is_weights: Tensor | None,
    mask: Tensor,
    row_length: int,
    ratio_center: Tensor | None,
    normalizer: Tensor | None,
    *scalars: Any,
) -> tuple[Tensor, ...]:
    """Run the operator `policy_loss_masked` of `steppo_kernels.backends.operators`."""
    *config, need_grad, need_entropy_grad = scalars
    outputs = _outputs(log_probs, need_grad, need_entropy_grad)
    loss, metrics, grad, grad_entropy, grad_scale = outputs
    kernels.policy_loss_masked(
        dtype_code(log_probs),
        pointer(log_probs),
        pointer(old_log_probs),
        pointer(advantages),
        pointer(ref_log_probs),
        pointer(entropy),
        pointer(is_weights),
        pointer(mask),
        row_length,
        pointer(ratio_center),
        pointer(normalizer),
        *config,
        log_probs.numel(),
        pointer(loss),
        pointer(metrics),
        pointer(grad),
        pointer(grad_entropy),
        pointer(grad_scale),
        threads(),
    )
    return outputs


def _outputs(log_probs: Tensor, need_grad: bool, need_entropy_grad: bool) -> tuple[Tensor, ...]:
    num_tokens = log_probs.numel()
    # The address of an empty tensor is 0, which tells the kernel that it is not wanted.
    return (
        log_probs.new_empty(()),
        empty(len(POLICY_METRICS), torch.float64),
        log_probs.new_empty(num_tokens if need_grad else 0),
        log_probs.new_empty(num_tokens if need_entropy_grad else 0),
        log_probs.new_empty(()),
    )
