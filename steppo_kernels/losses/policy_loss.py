"""The StepPO objective from token log-probs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import operators
from ..backends.choice import Backend
from ..backends.derivatives import (
    around_autograd,
    first_only,
    keep_inputs,
    kept_inputs,
    wants_gradient,
    with_others,
)
from ..backends.reference import policy_loss as reference
from ..backends.saved import hand_over, handed_back
from ..backends.untraced import traced
from ..config import DEFAULT_CONFIG, StepPOConfig
from ..layout.step_layout import StepLayout, require_layout
from ..outputs import POLICY_METRICS, Metrics, StepPOOutput
from .inputs import LossInputs, check_entropy, check_loss_inputs
from .scaled_gradient import scaled_gradient


@traced
def steppo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    layout: StepLayout | Tensor,
    *,
    config: StepPOConfig = DEFAULT_CONFIG,
    ref_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    is_weights: Tensor | None = None,
    step_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    ratio_center: float | Tensor | None = None,
    clip_low: Tensor | None = None,
    clip_high: Tensor | None = None,
    backend: Backend = "auto",
) -> StepPOOutput:
    r"""Return the step-level policy loss (StepPO, arXiv 2604.18401, section 3) and its family.

    With z the token log-ratios of a step of L tokens, x the log-ratio made of them and A the
    advantage (by default; `StepPOConfig` has the other ratios and surrogates):

    .. math:: x = \log\rho = \mu + L^{-p} \sum_i (z_i - \mu), \quad
              \ell = \max(-A\rho, -A\,\mathrm{clip}(\rho, 1-\epsilon_{low}, 1+\epsilon_{high}))

        l_s = mean_i w_i l(x_i, A_i)
        total = sum_s w_s (l_s + kl_coef mean_i KL_i - entropy_coef mean_i H_i) / normalizer

    The gradient by log pi of token i is w_i s_i L^-p, s = dl/dx at its own x_i and A_i. Where A and
    w are constant in a step, that is the derivative of l_s. Where they vary, it is the
    stop-gradient form of GSPO-token. The forward pass computes the gradients, so that backward only
    scales them. Masked tokens may hold anything.

    Args:
        log_probs: log-probs of the taken tokens under the current policy, of the token shape. Here
            and below, that may have dimensions of size 1 more or less, or be flat. fp16 and bf16
            are computed in fp32; the gradient comes back in the dtype of the input. Other inputs
            are converted to the dtype of the computation: fp64 if `log_probs` is, else fp32.
        old_log_probs: those of the policy that acted; None if that is the current one: then every
            ratio is exactly 1 (NaN where a log-prob is not finite). No gradient.
        advantages: per step ``[S]``, or of the token shape: then each token has its own. A vector
            of S numbers is always per step: flat numbers of as many tokens are given as ``[1, N]``,
            and numbers per row as ``x[layout.step_rows]``. No gradient.
        layout: the steps; or a mask, bool or 0/1, ``[B, T]`` or ``[N]`` (one row) whose runs of
            ones are the steps. With a mask, segmentation is part of the loss, and everything is
            given per token. On a GPU, and in a compiled graph, the mask's values are not
            checked, as that would wait for the device: what is not 0 is 1.
        config: hyper-parameters.
        ref_log_probs: reference policy for the KL penalty, of the token shape. No gradient.
        entropy: per-token entropies, of the token shape; gradients flow back to it.
        is_weights: rollout correction (`rollout_weights`), per step ``[S]`` or of the token shape:
            the w_i above. No gradient.
        step_weights: ``[S]``, replaces w_s.
        normalizer: replaces the denominator of the reduction; a number, or a 0-dim tensor (no
            host sync). A part of a batch (micro-batch, data-parallel rank) passes that of the
            whole, ``whole_layout.reduction_weights(reduction)[1]``, divided by what its gradients
            are divided by later: DDP and FSDP average over ranks, and accelerate divides by the
            accumulation steps. docs/parts_of_a_batch.md has a table of trainers. With a StepLayout
            that has no action token it may be 0, and makes no difference.
        ratio_center: mu of the centered ratio; by default the mean of z over all action tokens
            of this call. It plays no part in the other ratios, nor on-policy (no
            `old_log_probs`).
        clip_low: ``[S]``, the lower bound of each step in place of that of `config` (A2TGPO, arXiv
            2605.06200). It goes with a layout. On a GPU, and in a compiled graph, values are not
            checked. No gradient.
        clip_high: ``[S]``, the upper bound of each step.
        backend: implementation; one named explicitly never falls back.

    Returns:
        `StepPOOutput` with `POLICY_METRICS`: `ratio_*` and `clip_fraction*` are over non-empty
        steps (a step is clipped by the share of its tokens that are; with the ratio ``"token"`` its
        ratio is the mean of theirs), `token_clip_fraction`, `approx_kl` (mean of -z),
        `approx_kl_k3` (mean of e^z - 1 - z) and `dead_token_fraction` (no gradient at all) over
        action tokens. `num_steps` counts non-empty steps.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument.

    Example:
        >>> import torch
        >>> from steppo_kernels import StepLayout, StepPOConfig, steppo_loss
        >>> layout = StepLayout.from_mask(torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]))
        >>> log_probs = torch.full((2, 4), -1.0, requires_grad=True)
        >>> output = steppo_loss(
        ...     log_probs,
        ...     torch.full((2, 4), -1.1),
        ...     torch.tensor([1.0, -1.0, 0.5]),
        ...     layout,
        ...     config=StepPOConfig(clip_low=0.2, clip_high=0.28),
        ... )
        >>> output.loss.backward()
        >>> log_probs.grad
        tensor([[-0.1842, -0.1842,  0.0000,  0.3684],
                [ 0.0000, -0.0614, -0.0614, -0.0614]])
        >>> round(output.metrics.as_dict()["ratio_mean"], 4)
        1.1052
    """
    log_probs, inputs = check_loss_inputs(
        "log_probs",
        log_probs,
        old_log_probs,
        advantages,
        layout,
        config,
        ref_log_probs,
        is_weights,
        step_weights,
        normalizer,
        ratio_center,
        clip_low,
        clip_high,
        backend,
    )
    checks.as_many("log_probs", log_probs, inputs.shape)
    if entropy is not None or config.entropy_coef != 0:
        entropy = check_entropy(entropy, inputs)
    return loss_of(inputs, log_probs, entropy)


def loss_of(inputs: LossInputs, log_probs: Tensor, entropy: Tensor | None) -> StepPOOutput:
    """Return the loss of checked arguments: `log_probs` and `entropy` carry the gradients."""
    if inputs.backend == "reference":
        loss, metrics, step_log_ratio = _reference_loss(inputs, log_probs, entropy)
    elif wants_gradient(log_probs, entropy):
        loss, metrics, step_log_ratio = around_autograd(_PolicyLoss, log_probs, entropy, inputs)
    else:
        loss, metrics, step_log_ratio = run_operator(inputs, log_probs, entropy, False, False)[:3]
    return StepPOOutput(
        loss,
        Metrics(metrics, POLICY_METRICS, inputs.adds_up),
        None if inputs.layout is None else step_log_ratio,
    )


def _reference_loss(
    inputs: LossInputs, log_probs: Tensor, entropy: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    given, layout = inputs.constants, inputs.layout
    if layout is None:
        assert inputs.mask is not None
        layout = require_layout(StepLayout.from_mask(inputs.mask, backend="reference"))
    log_probs = checks.solid(log_probs, inputs.dtype)
    if entropy is not None:
        entropy = checks.solid(entropy, inputs.dtype)
    return reference.policy_loss(
        log_probs,
        entropy,
        given.old_log_probs,
        given.advantages,
        given.ref_log_probs,
        given.is_weights,
        given.step_weights,
        given.clip_low,
        given.clip_high,
        given.ratio_center,
        given.normalizer,
        layout.steps,
        inputs.config,
        given.advantages_per_token,
        given.is_weights_per_token,
    )


def run_operator(
    inputs: LossInputs,
    log_probs: Tensor,
    entropy: Tensor | None,
    need_grad: bool,
    need_entropy_grad: bool,
) -> tuple[Any, ...]:
    """Run the operator that fits, where autograd records nothing.

    A mask has no step log-ratios: None.
    """
    log_probs = checks.solid(log_probs, inputs.dtype)
    if entropy is not None:
        entropy = checks.solid(entropy, inputs.dtype)
    constants, mask = inputs.constants, inputs.mask
    if mask is None:
        run = operators.runner("policy_loss", inputs.backend)
        outputs: tuple[Any, ...] = run(log_probs, entropy, *constants, need_grad, need_entropy_grad)
        return outputs
    loss, metrics, grad, grad_entropy, scale = operators.runner(
        "policy_loss_masked", inputs.backend
    )(
        log_probs,
        entropy,
        constants.old_log_probs,
        constants.advantages,
        constants.ref_log_probs,
        constants.is_weights,
        constants.ratio_center,
        constants.normalizer,
        mask,
        mask.shape[-1],
        constants.config,
        need_grad,
        need_entropy_grad,
    )
    return loss, metrics, None, grad, grad_entropy, scale


class _PolicyLoss(torch.autograd.Function):
    """The loss is differentiable; the metrics and the step log-ratios are not."""

    @staticmethod
    def forward(
        ctx: Any,
        log_probs: Tensor,
        entropy: Tensor | None,
        inputs: LossInputs,
        others: list[Any] | None,
    ) -> Any:
        need_grad, need_entropy_grad, *_ = ctx.needs_input_grad
        loss, metrics, step_log_ratio, grad, grad_entropy, scale = run_operator(
            inputs, log_probs, entropy, need_grad, need_entropy_grad
        )
        hand_over(
            ctx, grad if need_grad else None, grad_entropy if need_entropy_grad else None, scale
        )
        keep_inputs(ctx, log_probs, entropy)
        ctx.log_probs = log_probs.shape, log_probs.dtype
        ctx.entropy = (None, None) if entropy is None else (entropy.shape, entropy.dtype)
        ctx.backend = inputs.backend
        return with_others(ctx, loss, others, metrics, step_log_ratio)

    @staticmethod
    @first_only("steppo_loss", kept_inputs)
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad, grad_entropy, scale = handed_back(ctx)
        return (
            scaled_gradient(ctx.backend, grad, grad_loss, scale, *ctx.log_probs),
            scaled_gradient(ctx.backend, grad_entropy, grad_loss, scale, *ctx.entropy),
            None,
            None,
        )
