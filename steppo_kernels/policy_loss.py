"""The StepPO objective from token log-probs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, ops
from .backends import Backend, resolve
from .config import KL_ESTIMATORS, RATIOS, REDUCTIONS, StepPOConfig
from .layout import StepLayout, require_layout
from .outputs import POLICY_METRICS, Metrics, StepPOOutput
from .reference import policy_loss as reference

_DEFAULT_CONFIG = StepPOConfig()

# Whether the running backward was called with retain_graph; a torch without the answer says yes.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def steppo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    layout: StepLayout | Tensor,
    *,
    config: StepPOConfig = _DEFAULT_CONFIG,
    ref_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    is_weights: Tensor | None = None,
    step_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    ratio_center: float | Tensor | None = None,
    backend: Backend = "auto",
) -> StepPOOutput:
    r"""Return the clipped step-level policy loss (StepPO, arXiv 2604.18401, section 3).

    With z the token log-ratios of a step of L tokens and A its advantage:

    .. math:: \log\rho = \mu + L^{-p} \sum_i (z_i - \mu), \quad
              \ell = \max(-A\rho, -A\,\mathrm{clip}(\rho, 1-\epsilon_{low}, 1+\epsilon_{high}))

        total = sum_s w_s (l_s + kl_coef mean_i KL_i - entropy_coef mean_i H_i) / normalizer

    The forward pass computes the gradients, so that backward only scales them. Masked tokens may
    hold anything. Under ``layout.per_token()`` this is PPO, under ``layout.per_trajectory()``
    GSPO.

    Args:
        log_probs: log-probs of the taken tokens under the current policy, of the token shape (or a
            view with as many elements). fp16 and bf16 are computed in fp32; the gradient comes
            back in the dtype of the input. Other inputs are converted to the dtype of the
            computation: fp64 if `log_probs` is, else fp32.
        old_log_probs: those of the policy that acted; None if that is the current one: then every
            ratio is exactly 1. No gradient.
        advantages: per step ``[S]``, or of the token shape: then the entry at the step's first
            action token counts. No gradient.
        layout: the steps; or a mask, bool or 0/1, ``[B, T]`` or ``[N]`` (one row) whose runs of
            ones are the steps. With a mask, segmentation is part of the loss, and everything is
            given per token. On a GPU, and in a compiled graph, the mask's values are not
            checked, as that would wait for the device: what is not 0 is 1.
        config: hyper-parameters.
        ref_log_probs: reference policy for the KL penalty, of the token shape. No gradient.
        entropy: per-token entropies, of the token shape; gradients flow back to it.
        is_weights: rollout correction. Per step ``[S]`` it multiplies l_s; per token the value
            becomes l_s mean(w_i) and the gradient of token i is scaled by w_i. No gradient.
        step_weights: ``[S]``, replaces w_s.
        normalizer: replaces the denominator of the reduction; a number, or a 0-dim tensor (no
            host sync). Micro-batches and data-parallel ranks pass the global count.
        ratio_center: mu of the centered ratio; by default the mean of z over all action tokens
            of this call. It plays no part in the other ratios, nor on-policy (no
            `old_log_probs`).
        backend: implementation; one named explicitly never falls back.

    Returns:
        `StepPOOutput` with `POLICY_METRICS`: `ratio_*` and `clip_fraction*` are over non-empty
        steps, `token_clip_fraction`, `approx_kl` (mean of -z), `approx_kl_k3` (mean of
        e^z - 1 - z) and `dead_token_fraction` (no gradient at all) over action tokens. `num_steps`
        counts non-empty steps.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument.
    """
    if not isinstance(config, StepPOConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a StepPOConfig")
    mask: Tensor | None = None
    steps: StepLayout | None = None
    if isinstance(layout, Tensor):
        mask = checks.flags("layout", layout, (1, 2), wait=False)
        num_steps, shape, device = None, mask.shape, mask.device
    else:
        steps = require_layout(layout)
        num_steps, shape, device = steps.num_steps, steps.shape, steps.device
    dtype = checks.compute_dtype(checks.floating("log_probs", log_probs, device))
    chosen = resolve(backend, device)

    new = checks.tokens("log_probs", log_probs, shape, device, dtype)
    old, ref, entropy = (
        None if value is None else checks.tokens(name, value, shape, device, dtype)
        for name, value in (
            ("old_log_probs", old_log_probs),
            ("ref_log_probs", ref_log_probs),
            ("entropy", entropy),
        )
    )
    advantages, by_token = checks.steps_or_tokens(
        "advantages", advantages, num_steps, shape, device, dtype
    )
    weights_by_token = False
    if is_weights is not None:
        is_weights, weights_by_token = checks.steps_or_tokens(
            "is_weights", is_weights, num_steps, shape, device, dtype
        )
    if step_weights is not None:
        if num_steps is None:
            raise ValueError("step_weights: got it with a mask, expected a StepLayout with it")
        step_weights = checks.vector("step_weights", step_weights, num_steps, "step", device, dtype)
    if config.kl_coef != 0 and ref is None:
        raise ValueError("ref_log_probs: got None, expected a tensor, as config.kl_coef is not 0")
    if config.entropy_coef != 0 and entropy is None:
        raise ValueError("entropy: got None, expected a tensor, as config.entropy_coef is not 0")
    center = checks.scalar("ratio_center", ratio_center, device)
    if old is None:
        # On-policy every ratio is 1, whatever the center of an earlier batch was.
        center = None
    total = checks.scalar("normalizer", normalizer, device, positive=True)
    tokens = (
        new, _constant(old), advantages.detach(), _constant(ref), entropy, _constant(is_weights)
    )  # fmt: skip
    flags = _constant(step_weights), by_token, weights_by_token

    if chosen == "reference":
        if mask is not None:
            steps = StepLayout.from_mask(mask, backend="reference")
        loss, metrics, step_log_ratio = reference.policy_loss(
            *tokens, *flags, *_step_tensors(steps), center, total, config
        )
    else:
        need_grad, need_entropy_grad = (
            torch.is_grad_enabled() and t is not None and t.requires_grad for t in (new, entropy)
        )
        scalars = (
            center, total, RATIOS.index(config.ratio), float(config.clip_low),
            float(config.clip_high), float(config.dual_clip or 0.0), float(config.log_ratio_max),
            REDUCTIONS.index(config.reduction), float(config.kl_coef),
            KL_ESTIMATORS.index(config.kl_estimator), float(config.entropy_coef),
            need_grad, need_entropy_grad,
        )  # fmt: skip
        run = _PolicyLoss.apply if need_grad or need_entropy_grad else _run
        if mask is None:
            loss, metrics, step_log_ratio = run(
                "policy_loss", chosen, *tokens, *flags, *_step_tensors(steps), *scalars
            )[:3]
        else:
            loss, metrics = run(
                "policy_loss_masked",
                chosen,
                *tokens,
                mask.reshape(-1).contiguous(),
                shape[-1],
                *scalars,
            )[:2]
    return StepPOOutput(
        loss, Metrics(metrics, POLICY_METRICS), step_log_ratio if mask is None else None
    )


def scaled(grad: Tensor | None, scale: Tensor) -> Tensor | None:
    """Return a saved gradient times a 0-dim scale; itself where that changes nothing.

    On the CPU the scale can be looked at without waiting, and it is 1 in a plain
    ``loss.backward()``. The saved tensor itself may only be given away if this is its last use.
    """
    if grad is None:
        return None
    is_last = not torch.compiler.is_compiling() and not _keeps_graph()
    return grad if is_last and scale.device.type == "cpu" and scale.item() == 1.0 else grad * scale


def _constant(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()


def _step_tensors(layout: StepLayout | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert layout is not None
    return (
        layout.step_ids.view(-1), layout.token_index, layout.step_offsets,
        layout.trajectory_counts,
    )  # fmt: skip


def _run(name: str, backend: str, *args: Any) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = ops.call(name, backend, *args)
    return outputs


class _PolicyLoss(torch.autograd.Function):
    """Both operators: outputs before the last three have no gradient but the first, the loss."""

    @staticmethod
    def forward(ctx: Any, name: str, backend: str, *args: Any) -> tuple[Tensor, ...]:
        *outputs, grad, grad_entropy, grad_scale = _run(name, backend, *args)
        need_grad, need_entropy_grad = args[-2:]
        ctx.save_for_backward(
            grad if need_grad else None, grad_entropy if need_entropy_grad else None, grad_scale
        )
        ctx.num_rest = len(args) - 5
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad, grad_entropy, grad_scale = ctx.saved_tensors
        scale = grad_loss * grad_scale
        return (
            None, None, scaled(grad, scale), None, None, None, scaled(grad_entropy, scale),
            *(None,) * ctx.num_rest,
        )  # fmt: skip
