"""The StepPO objective from logits."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..backends.choice import Backend
from ..backends.untraced import traced_without
from ..config import DEFAULT_CONFIG, StepPOConfig
from ..layout.step_layout import StepLayout
from ..log_probs.kept_rows import check_support, rows_of
from ..log_probs.targets import Targets
from ..log_probs.token_log_probs import log_probs_of, logits_of
from ..log_probs.token_support import TokenSupport
from ..outputs import StepPOOutput
from .inputs import check_loss_inputs
from .policy_loss import loss_of


@traced_without("support")
def steppo_loss_from_logits(
    logits: Tensor,
    token_ids: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    layout: StepLayout | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    support: TokenSupport | None = None,
    inplace_backward: bool = False,
    config: StepPOConfig = DEFAULT_CONFIG,
    ref_log_probs: Tensor | None = None,
    is_weights: Tensor | None = None,
    step_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    ratio_center: float | Tensor | None = None,
    clip_low: Tensor | None = None,
    clip_high: Tensor | None = None,
    report_entropy: bool = False,
    backend: Backend = "auto",
) -> StepPOOutput:
    """Return `steppo_loss` of the log-probs (and, with an `entropy_coef`, entropies) of logits.

    Rows of masked tokens are never read, those of clipped steps are only zeroed by backward.
    Positions are aligned: position i of `logits` predicts ``token_ids[i]``, whose place in `layout`
    is i. For a causal LM that is ``logits[:, :-1]`` with ``token_ids[:, 1:]`` and a layout of the
    latter's shape.

    Args:
        logits: ``[*shape, V]``, fp32, fp64, fp16 or bf16; slices are read as they are. The gradient
            comes back in the same dtype.
        token_ids: int, of the token shape, or flat; may hold anything at masked tokens.
        old_log_probs: as in `steppo_loss`.
        advantages: as in `steppo_loss`.
        layout: as in `steppo_loss`.
        temperature: above 0, what logits are divided by; a number or one for each token.
        support: the ids that each token could be sampled from, as in `token_log_probs`; sets of
            masked tokens may be anything.
        inplace_backward: let backward overwrite `logits` (of a slice, all of the sliced tensor)
            with their gradient: no second tensor of that size exists then. As in
            `token_log_probs`; a second backward raises.
        config: as in `steppo_loss`.
        ref_log_probs: as in `steppo_loss`.
        is_weights: as in `steppo_loss`.
        step_weights: as in `steppo_loss`.
        normalizer: as in `steppo_loss`.
        ratio_center: as in `steppo_loss`.
        clip_low: as in `steppo_loss`.
        clip_high: as in `steppo_loss`.
        report_entropy: fill the metric `entropy` without an `entropy_coef` too.
        backend: implementation; one named explicitly never falls back.

    Returns:
        As `steppo_loss`; the metric `entropy` is 0 without an `entropy_coef` or `report_entropy`.

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: in backward, where an input was changed in place since the forward pass, for a
            second backward after one in place, and for second derivatives.

    Example:
        >>> import torch
        >>> from steppo_kernels import StepLayout, steppo_loss_from_logits
        >>> layout = StepLayout.from_mask(torch.tensor([[0, 1, 1, 0, 1]]))
        >>> logits = torch.zeros(1, 5, 4, requires_grad=True)
        >>> ids, advantages = torch.tensor([[0, 1, 2, 3, 0]]), torch.tensor([1.0, -3.0])
        >>> output = steppo_loss_from_logits(logits, ids, None, advantages, layout)
        >>> output.loss.item()
        1.0
        >>> output.loss.backward()
        >>> logits.grad[0, 4]
        tensor([ 1.1250, -0.3750, -0.3750, -0.3750])
    """
    checks.switch("inplace_backward", inplace_backward)
    checks.switch("report_entropy", report_entropy)
    logits = logits_of("logits", logits)
    logits, inputs = check_loss_inputs(
        "logits",
        logits,
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
    checks.in_order("logits", logits, inputs.shape, "vocabulary")
    if inputs.layout is not None:
        is_action = inputs.layout.is_action()
    else:
        assert inputs.mask is not None
        # The kernels of a GPU read any byte but 0 as True, the others take what is 0 or 1.
        reads_bytes = inputs.backend in ("triton", "cuda")
        is_action = (inputs.mask if reads_bytes else checks.ones_of(inputs.mask)).view(-1)
    targets = Targets.of(token_ids, is_action, temperature, inputs.shape, inputs.device)
    kept = None
    if support is not None:
        checked = check_support(support, inputs.shape, inputs.device)
        kept = rows_of(checked, targets.token_ids, targets.rows(), logits.shape[-1])
    has_bonus = config.entropy_coef != 0
    log_probs, entropy = log_probs_of(
        logits,
        targets,
        temperature,
        has_bonus or report_entropy,
        inplace_backward,
        inputs.backend,
        kept,
    )
    if not report_entropy and not has_bonus:
        return loss_of(inputs, log_probs, None)
    return loss_of(inputs, log_probs, entropy if has_bonus else checks.constant(entropy))
