"""The log-ratio of each step, for objectives that the losses do not have."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..backends.choice import Backend, resolve
from ..backends.untraced import traced
from ..config import RATIOS, RatioKind, one_of
from ..layout.broadcast import sum_over_steps
from ..layout.step_layout import StepLayout, require_layout
from ..layout.step_tensors import StepTensors


@traced
def step_log_ratios(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    layout: StepLayout | Tensor,
    *,
    ratio: RatioKind = "geometric",
    ratio_center: float | Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Return the log-ratio of each step, differentiable: the x of `steppo_loss`, unclamped.

    .. math:: x_s = \mu + L^{-p} \sum_i (z_i - \mu), \quad z_i = \log\pi(i) - \log\pi_{old}(i)

    A surrogate of any kind is a function of S numbers then. Masked tokens may hold anything.

    Args:
        log_probs: log-probs of the taken tokens under the current policy, of the token shape (with
            dimensions of size 1 more or less, or flat). fp16 and bf16 are computed in fp32; the
            gradient comes back in the dtype of the input.
        old_log_probs: those of the policy that acted, of the token shape; None if that is the
            current one: then every log-ratio is 0 (NaN where a log-prob is not finite). No
            gradient.
        layout: the steps; or a mask, bool or 0/1, ``[B, T]`` or ``[N]`` (one row), of which a
            layout is made first.
        ratio: ``"geometric"`` mean z, ``"product"`` sum z, or ``"centered"`` with p = 1/2, as in
            `StepPOConfig`. ``"token"`` is mean z too, which is what `steppo_loss` reports for it.
        ratio_center: mu of the centered ratio; by default the mean of z over all action tokens of
            this call. No gradient. It plays no part in the other ratios, nor on-policy.
        backend: implementation.

    Returns:
        ``[S]``, fp32 (fp64 if `log_probs` is); 0 for an empty step. It is linear in `log_probs`, so
        that second derivatives of what is made of it are right too.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument.

    Example:
        >>> import torch
        >>> from steppo_kernels import StepLayout, step_log_ratios
        >>> layout = StepLayout.from_mask(torch.tensor([[1, 1, 0, 1]]))
        >>> log_probs = torch.tensor([[-1.0, -1.5, 0.0, -0.5]], requires_grad=True)
        >>> x = step_log_ratios(log_probs, torch.full((1, 4), -1.0), layout)
        >>> x.detach()
        tensor([-0.2500,  0.5000])
        >>> loss = -(torch.tensor([1.0, -2.0]) * x.exp().clamp(max=1.0)).mean()
        >>> loss.backward()
        >>> log_probs.grad
        tensor([[-0.1947, -0.1947,  0.0000,  0.0000]])
    """
    one_of("ratio", ratio, RATIOS)
    steps = steps_of(layout, backend)
    device, shape = steps.device, steps.shape
    chosen = resolve(backend, device)
    log_probs = checks.token_count("log_probs", log_probs, shape, device)
    dtype = checks.compute_dtype(log_probs)
    center = checks.scalar("ratio_center", ratio_center, device)
    new = checks.flat(log_probs, dtype)
    if old_log_probs is None:
        old = new.detach()
        center = checks.scalar("ratio_center", 0.0, device)
    else:
        old = checks.tokens("old_log_probs", old_log_probs, shape, device, dtype)
        old = checks.constant(old).view(-1)
    z = new - old
    lengths = steps.step_lengths.clamp_min(1).to(dtype)
    if ratio == "product":
        return sum_over_steps(z, steps, chosen)
    if ratio != "centered":
        return sum_over_steps(z, steps, chosen) / lengths
    if center is None:
        mean = sum_over_steps(z.detach(), steps, chosen).sum() / max(steps.num_tokens, 1)
    else:
        mean = center.to(dtype)
    moved = mean + sum_over_steps(z - mean, steps, chosen) / lengths.sqrt()
    return torch.where(steps.step_lengths > 0, moved, 0.0)


def steps_of(layout: StepLayout | Tensor, backend: Backend) -> StepTensors:
    """Return the steps of a layout, or the runs of ones of a mask."""
    if isinstance(layout, Tensor):
        mask = checks.flags("layout", layout, (1, 2), wait=False)
        layout = StepLayout.from_mask(mask, backend=backend)
    return require_layout(layout)
