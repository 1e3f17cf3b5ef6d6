"""The StepPO objective from hidden states whose tokens lie on several ranks."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends.choice import Backend
from ..backends.untraced import untraced
from ..config import DEFAULT_CONFIG, StepPOConfig
from ..layout.step_layout import StepLayout, require_layout
from ..log_probs.linear_token_log_probs import linear_token_log_probs
from ..log_probs.vocabulary_shard import local_hidden
from ..losses.inputs import check_loss_inputs
from ..losses.policy_loss import steppo_loss
from ..outputs import StepPOOutput
from ..ranks import Call, Ranks
from .shard import ContextShard, put_together, shard_facts, word_of
from .words import value_of


@untraced
def context_linear_steppo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    layout: StepLayout | Tensor,
    shard: ContextShard,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    tp_group: Any = None,
    vocab_start: int | None = None,
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
    """Return `linear_steppo_loss` of a batch whose hidden states lie on several ranks.

    What the head takes (`hidden`, `token_ids`, a `temperature` of each token) is of the **tokens of
    this rank**. What the loss takes (`layout`, `old_log_probs`, `advantages` and the rest) is of
    the **whole batch**, the same on all ranks. All ranks call it.

    Each rank computes the log-probs of its own action tokens, one gather brings them together, and
    each rank computes the loss of the whole from the same bits, so that all take the same decision
    on every step. The work is 2 + 6f times M_r d V operations for the M_r action tokens of this
    rank of which f are live: their logits are formed again in backward.

    It speaks to the other ranks twice: in a gather of 168 bytes a rank, in which they agree on
    shapes, dtypes and hyper-parameters, and in one of 4 bytes (8 for fp64) for each token of the
    rank that has the most, twice as many with entropies. The host waits for both. Backward does not
    speak to them. With `tp_group`, `linear_token_log_probs` speaks to the ranks of that group.

    Args:
        hidden: ``[B, T_r, d]``, or ``[N_r, d]`` with a shard of ``dim=0``, the states of
            ``shard.columns``; fp32, fp64, fp16 or bf16. Position i predicts ``token_ids[i]``. With
            `tp_group` it may be a DTensor over these ranks that is whole on each, ``Replicate()``.
        weight: ``[V, d]``, the whole head on all ranks; as in `linear_steppo_loss`. With
            `tp_group`, this rank's rows of it.
        token_ids: int ``[B, T_r]`` or ``[N_r]``; ``shard.local`` of ids that were shifted as a
            whole, as the token that the last position of a rank predicts may lie on another one.
        old_log_probs: of the token shape of the whole; as in `steppo_loss`.
        advantages: ``[S]`` or of the token shape of the whole; as in `steppo_loss`.
        layout: the steps of the whole batch, or their mask.
        shard: the tokens of this rank.
        bias: ``[V]``.
        temperature: above 0, what logits are divided by; a number that is the same on all ranks,
            or one for each token of this rank.
        softcap: logits become ``softcap * tanh(logits / softcap)`` first.
        chunk_tokens: rows of a chunk; as in `linear_token_log_probs`. Ranks may have different
            ones.
        tp_group: as in `linear_token_log_probs`: ranks that have the same tokens, and other rows of
            the head.
        vocab_start: as in `linear_token_log_probs`.
        config: as in `steppo_loss`.
        ref_log_probs: of the token shape of the whole; as in `steppo_loss`.
        is_weights: ``[S]`` or of the token shape of the whole; as in `steppo_loss`.
        step_weights: as in `steppo_loss`.
        normalizer: as in `steppo_loss`. If the gradients of the ranks of the shard are averaged
            (FSDP over a mesh with them in it) instead of summed, it is that of `batch_reduction`
            over the data-parallel group divided by ``shard.size``.
        ratio_center: as in `steppo_loss`.
        clip_low: as in `steppo_loss`.
        clip_high: as in `steppo_loss`.
        report_entropy: fill the metric `entropy` without an `entropy_coef` too.
        backend: implementation of what is not a matrix product.

    Returns:
        As `linear_steppo_loss`: the loss, metrics and step log-ratios of the whole batch, the same
        bits on all ranks (of one kind of device). Gradients of `hidden` are those of the tokens of
        this rank; gradients of `weight` and `bias` are this rank's share, to be summed over the
        ranks of the shard.

    Raises:
        ValueError, TypeError: naming the argument; or ranks got different arguments.
        RuntimeError: another rank raised an error; or in backward, as `linear_steppo_loss`.

    Example:
        >>> import torch.distributed as dist
        >>> from steppo_kernels.distributed import ContextShard, context_linear_steppo_loss
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> layout = StepLayout.from_mask(torch.tensor([[0, 1, 1, 0, 1]]))
        >>> ids, advantages = torch.tensor([[0, 1, 2, 3, 0]]), torch.tensor([1.0, -3.0])
        >>> shard = ContextShard.zigzag(5)
        >>> hidden = torch.ones(1, len(shard.columns), 3, requires_grad=True)  # of its tokens
        >>> weight = torch.zeros(4, 3, requires_grad=True)
        >>> output = context_linear_steppo_loss(
        ...     hidden, weight, shard.local(ids), None, advantages, layout, shard
        ... )
        >>> output.loss.backward()
        >>> weight.grad[:, 0]
        tensor([ 1.2500, -0.5000, -0.5000, -0.2500])
        >>> dist.destroy_process_group()
    """
    if not isinstance(shard, ContextShard):
        raise TypeError(f"shard: got {type(shard).__name__}, expected a ContextShard")
    options: dict[str, Any] = {
        "config": config,
        "ref_log_probs": ref_log_probs,
        "is_weights": is_weights,
        "step_weights": step_weights,
        "normalizer": normalizer,
        "ratio_center": ratio_center,
        "clip_low": clip_low,
        "clip_high": clip_high,
        "backend": backend,
    }
    with Call("context_linear_steppo_loss", "group", shard.ranks) as call:
        checks.switch("report_entropy", report_entropy)
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight: got {type(weight).__name__}, expected a torch.Tensor")
        if tp_group is not None:
            hidden = local_hidden("hidden", hidden, Ranks.of("tp_group", tp_group))
        if isinstance(layout, Tensor):
            layout = StepLayout.from_mask(layout, backend=backend)
        held = require_layout(layout)
        hidden, inputs = check_loss_inputs(
            "hidden", hidden, old_log_probs, advantages, layout, **options
        )
        shape = shard.local_shape(held.shape)
        hidden = checks.in_order("hidden", hidden, shape, "hidden size")
        ids = checks.token_ids("token_ids", token_ids, shape, held.device).view(shape)
        need_entropy = report_entropy or config.entropy_coef != 0
        # Of this shape and dtype are log-probs and entropies, which are not there yet.
        alike = torch.empty(shape, dtype=inputs.dtype, device="meta")
        size = word_of(shard, [alike, alike] if need_entropy else [alike])
        call.agree(
            {
                **shard_facts(shard),
                "layout": (tuple(held.shape), held.num_steps, held.num_tokens),
                "hidden": (inputs.dtype, hidden.dtype, hidden.shape[-1]),
                "weight": (weight.dtype, tuple(weight.shape)),
                "softcap": value_of(softcap),
                "report_entropy": report_entropy,
                # A rank may have temperatures of as many tokens as it has.
                "temperature": value_of(
                    "by token" if isinstance(temperature, Tensor) else temperature
                ),
                **{f"config.{name}": value_of(value) for name, value in asdict(config).items()},
                **{name: value_of(value) for name, value in options.items() if name != "config"},
                "old_log_probs": value_of(old_log_probs),
                "advantages": value_of(advantages),
            }
        )
        call.open(*size, held.device)
        found = linear_token_log_probs(
            hidden.reshape(*shape, hidden.shape[-1]),
            weight,
            ids,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            mask=shard.local(held.is_action().view(held.shape)),
            return_entropy=need_entropy,
            chunk_tokens=chunk_tokens,
            tp_group=tp_group,
            vocab_start=vocab_start,
            backend=backend,
        )
        log_probs, *entropy = put_together(
            shard, call, found if isinstance(found, tuple) else (found,)
        )
    return steppo_loss(
        log_probs,
        old_log_probs,
        advantages,
        layout,
        entropy=entropy[0] if need_entropy else None,
        **options,
    )
