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
    ends_tell = None if _ends_tell(token_index, step_offsets) else empty((), torch.int64)
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
        pointer(ends_tell),
        threads(),
    )
    if ends_tell is not None and ends_tell.item():
        _remember(token_index, step_offsets)
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


# A step of which the first and last position span its length mostly lies in one piece. It need not:
# a step of several rows may hold these in any order. The kernel looks at every position once, and
# the answer is kept with the index, as a layout is used for more than one loss.
def _ends_tell(token_index: Tensor, step_offsets: Tensor) -> bool:
    kept = getattr(token_index, "_steppo_ends_tell", None)
    if kept is None or kept[0] is not step_offsets:
        return False
    return bool(kept[1:] == (token_index._version, step_offsets._version))


def _remember(token_index: Tensor, step_offsets: Tensor) -> None:
    # What was made in inference mode does not tell when it is changed.
    if not (token_index.is_inference() or step_offsets.is_inference()):
        versions = token_index._version, step_offsets._version
        token_index._steppo_ends_tell = (step_offsets, *versions)  # type: ignore[attr-defined]


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
