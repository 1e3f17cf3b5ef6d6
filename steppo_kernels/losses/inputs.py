"""The arguments of the clipped step objective that do not depend on where log-probs come from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..backends.choice import resolve
from ..config import StepPOConfig
from ..layout.step_layout import StepLayout, require_layout
from ..layout.step_tensors import StepTensors


class Steps(NamedTuple):
    """Steps as the loss reads them: those of a layout, or a range of steps with rows of its own.

    Attributes:
        step_ids: int32 ``[N]``, -1 where no action token.
        token_index: int64 ``[M]``.
        step_offsets: int64 ``[S + 1]``.
        trajectory_counts: int32 ``[S]``.
    """

    step_ids: Tensor
    token_index: Tensor
    step_offsets: Tensor
    trajectory_counts: Tensor

    @classmethod
    def of(cls, layout: StepTensors) -> Steps:
        """Return the steps of a layout."""
        return cls(
            layout.step_ids.view(-1),
            layout.token_index,
            layout.step_offsets,
            layout.trajectory_counts,
        )


class LossInputs(NamedTuple):
    """Checked arguments: constants, flat and contiguous in the dtype of the computation.

    Attributes:
        backend: the one that runs.
        shape, device, dtype: the token shape, and where and in what to compute.
        layout, mask: what was given; one of them is None.
        steps: the steps of `layout`; None with a mask.
        old_log_probs, ref_log_probs: ``[N]``.
        advantages, is_weights: ``[N]`` or ``[S]``, as the flag next to each says.
        step_weights: ``[S]``.
        ratio_center, normalizer: 0-dim fp64.
    """

    backend: str
    shape: torch.Size
    device: torch.device
    dtype: torch.dtype
    layout: StepTensors | None
    mask: Tensor | None
    steps: Steps | None
    old_log_probs: Tensor | None
    advantages: Tensor
    advantages_per_token: bool
    ref_log_probs: Tensor | None
    is_weights: Tensor | None
    is_weights_per_token: bool
    step_weights: Tensor | None
    ratio_center: Tensor | None
    normalizer: Tensor | None
    config: StepPOConfig


def check_loss_inputs(
    name: str,
    values: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    layout: StepLayout | Tensor,
    config: StepPOConfig,
    ref_log_probs: Tensor | None,
    is_weights: Tensor | None,
    step_weights: Tensor | None,
    normalizer: float | Tensor | None,
    ratio_center: float | Tensor | None,
    backend: str,
) -> LossInputs:
    """Return the checked arguments of a loss from `values`, the argument `name`."""
    if not isinstance(config, StepPOConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a StepPOConfig")
    mask: Tensor | None = None
    held: StepTensors | None = None
    if isinstance(layout, Tensor):
        mask = checks.flags("layout", layout, (1, 2), wait=False)
        num_steps, shape, device = None, mask.shape, mask.device
    else:
        held = require_layout(layout)
        num_steps, shape, device = held.num_steps, held.shape, held.device
    dtype = checks.compute_dtype(checks.floating(name, values, device, saved=False))
    chosen = resolve(backend, device)
    old, ref = None, None
    if old_log_probs is not None:
        old = checks.tokens("old_log_probs", old_log_probs, shape, device, dtype).detach()
    if ref_log_probs is not None:
        ref = checks.tokens("ref_log_probs", ref_log_probs, shape, device, dtype).detach()
    advantages, by_token = checks.steps_or_tokens(
        "advantages", advantages, num_steps, shape, device, dtype
    )
    weights_by_token = False
    if is_weights is not None:
        is_weights, weights_by_token = checks.steps_or_tokens(
            "is_weights", is_weights, num_steps, shape, device, dtype
        )
        is_weights = is_weights.detach()
    if step_weights is not None:
        if num_steps is None:
            raise ValueError("step_weights: got it with a mask, expected a StepLayout with it")
        step_weights = checks.vector("step_weights", step_weights, num_steps, "step", device, dtype)
        step_weights = step_weights.detach()
    if config.kl_coef != 0 and ref is None:
        raise ValueError("ref_log_probs: got None, expected a tensor, as config.kl_coef is not 0")
    center = checks.scalar("ratio_center", ratio_center, device)
    if old is None and config.ratio == "centered":
        # On-policy every ratio is 1, whatever the center of an earlier batch was.
        center = checks.scalar("ratio_center", 0.0, device)
    return LossInputs(
        chosen,
        shape,
        device,
        dtype,
        held,
        mask,
        None if held is None else Steps.of(held),
        old,
        advantages.detach(),
        by_token,
        ref,
        is_weights,
        weights_by_token,
        step_weights,
        center,
        checks.normalizer(normalizer, device, held is not None and held.num_tokens == 0),
        config,
    )


def check_entropy(entropy: Tensor | None, inputs: LossInputs) -> Tensor | None:
    """Return per-token entropies as they are, checked; they are needed if they have a weight."""
    if entropy is not None:
        return checks.token_count("entropy", entropy, inputs.shape, inputs.device)
    if inputs.config.entropy_coef != 0:
        raise ValueError("entropy: got None, expected a tensor, as config.entropy_coef is not 0")
    return None
