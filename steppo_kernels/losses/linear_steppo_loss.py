"""The StepPO objective from hidden states and the output head, in one pass over its logits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends.choice import Backend
from ..backends.derivatives import first_only, keep_inputs, kept_inputs
from ..backends.records import Steps
from ..backends.reference.reductions import reduction_weights
from ..backends.saved import save, saved
from ..backends.untraced import untraced
from ..config import DEFAULT_CONFIG, StepPOConfig
from ..layout.step_layout import StepLayout, require_layout
from ..log_probs.kept_rows import check_support
from ..log_probs.linear_token_log_probs import log_probs_of_head
from ..log_probs.lm_head import (
    Evaluated,
    Head,
    HeadGradients,
    check_chunk,
    check_head,
    live_rows,
)
from ..log_probs.sharded_head import localized, on_shards, shared
from ..log_probs.token_support import TokenSupport
from ..outputs import POLICY_METRICS, Metrics, StepPOOutput
from .inputs import LossInputs, check_loss_inputs
from .policy_loss import loss_of, run_operator
from .scaled_gradient import scaled_gradient

_NAME = "linear_steppo_loss"


@untraced
def linear_steppo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    layout: StepLayout | Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    support: TokenSupport | None = None,
    sparse_grad: bool = False,
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
    """Return `steppo_loss` of ``hidden @ weight.T + bias``, and form its gradients in one pass.

    Only action tokens enter a product. Whole steps are packed into chunks; within a chunk the
    log-probs give the step ratios, these the gradient of every token, and the logits are
    overwritten by it, for live rows only (a clipped step has none): 2 + 4f times M d V operations
    for M action tokens of which f are live, and no tensor of the size of all logits. A step longer
    than a chunk takes its logits twice, as all steps do with the ratio ``"centered"`` if
    `ratio_center` is not given. Gradients are formed in the forward pass; backward scales them.
    `torch.compile` breaks its graph here, as the work depends on what is found.

    With `support`, softmaxes are over the ids that each token could be sampled from, and only their
    rows of the weight are read, as in `linear_token_log_probs`. Their logits are so few that
    backward keeps them, and forms the gradients.

    With `tp_group`, the vocabulary is split over ranks as in `linear_token_log_probs`. All of it
    happens in the forward pass: 1 collective for what the ranks were given, 1 for each chunk whose
    logits are formed, 1 in the end that says that none failed, and 1 for the sum of the gradient of
    the hidden states, if these want one. The reference speaks as `linear_token_log_probs` does.

    Args:
        hidden: ``[*shape, d]``, fp32, fp64, fp16 or bf16; position i predicts ``token_ids[i]``,
            whose place in `layout` is i.
        weight: ``[V, d]`` in the dtype of `hidden` (under autocast both are cast, but not fp64);
            may be strided or tied. If it needs no gradient, none is formed; the same holds for
            `hidden`.
        token_ids: int, of the token shape, or flat; may hold anything at masked tokens.
        old_log_probs: as in `steppo_loss`.
        advantages: as in `steppo_loss`.
        layout: as in `steppo_loss`; of a mask, a layout is made first.
        bias: ``[V]``.
        temperature: above 0, what logits are divided by; a number or one for each token.
        softcap: logits become ``softcap * tanh(logits / softcap)`` first; 1e-30 to 1e30.
        support: as in `linear_token_log_probs`; sets of masked tokens may be anything.
        sparse_grad: as in `linear_token_log_probs`.
        chunk_tokens: action tokens of a chunk. None takes as many as have (fp32) logits of 256 MiB
            on a CPU or of a sixteenth of a GPU's memory, and at least 128. With more than one chunk
            the products of the weight's gradient, each rounded to its dtype, are summed in fp32: in
            memory of its own, besides the gradient, that is read and written once per chunk, which
            makes small chunks dear (the benchmarks have two of 128 tokens next to one of 256). A
            GPU does not round the products where torch adds them in fp32, and if at most d rows
            have a gradient it forms one product of these in the end. On a CPU, up to 256 MiB stay
            allocated for the next call, and so does a gradient of the weight of up to 2 GiB after
            it was dropped (`steppo_kernels.memory.release`).
        tp_group: as in `linear_token_log_probs`.
        vocab_start: as in `linear_token_log_probs`.
        config: as in `steppo_loss`.
        ref_log_probs: as in `steppo_loss`.
        is_weights: as in `steppo_loss`.
        step_weights: as in `steppo_loss`.
        normalizer: as in `steppo_loss`.
        ratio_center: as in `steppo_loss`.
        clip_low: as in `steppo_loss`.
        clip_high: as in `steppo_loss`.
        report_entropy: fill the metric `entropy` without an `entropy_coef` too.
        backend: implementation of what is not a matrix product.

    Returns:
        As `steppo_loss`; the metric `entropy` is 0 without an `entropy_coef` or `report_entropy`.

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: in backward, where the temperature was changed in place since the forward
            pass, and for second derivatives; with `tp_group`, where another rank raised.

    Example:
        >>> import torch
        >>> from steppo_kernels import StepLayout, linear_steppo_loss
        >>> layout = StepLayout.from_mask(torch.tensor([[0, 1, 1, 0, 1]]))
        >>> hidden = torch.ones(1, 5, 3, requires_grad=True)
        >>> weight = torch.zeros(4, 3, requires_grad=True)
        >>> ids, advantages = torch.tensor([[0, 1, 2, 3, 0]]), torch.tensor([1.0, -3.0])
        >>> output = linear_steppo_loss(hidden, weight, ids, None, advantages, layout)
        >>> output.loss.backward()
        >>> weight.grad[:, 0]
        tensor([ 1.2500, -0.5000, -0.5000, -0.2500])
    """
    with on_shards(_NAME, tp_group, vocab_start) as call:
        checks.switch("report_entropy", report_entropy)
        checks.switch("sparse_grad", sparse_grad)
        if call is not None:
            hidden, weight, bias, vocab_start = localized(
                hidden, weight, bias, vocab_start, call.ranks
            )
        _, inputs = check_loss_inputs(
            "hidden",
            hidden,
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
        hidden = checks.in_order(
            "hidden", checks.tensor("hidden", hidden), inputs.shape, "hidden size"
        )
        inputs = _with_layout(inputs, backend)
        assert inputs.layout is not None
        is_action = inputs.layout.step_ids.reshape(-1) >= 0
        of_head = (
            hidden,
            weight,
            bias,
            temperature,
            softcap,
            inputs.shape,
            is_action,
            inputs.backend,
        )
        rows, head = check_head(*of_head, is_shard=call is not None, sparse_grad=sparse_grad)
        ids = checks.token_ids("token_ids", token_ids, inputs.shape, inputs.device)
        count = inputs.layout.num_tokens
        has_bonus = config.entropy_coef != 0
        need_entropy = has_bonus or report_entropy
        if support is not None:
            support = check_support(support, inputs.shape, inputs.device)
        if call is not None:
            given = rows, chunk_tokens, count, need_entropy, support, _facts(inputs)
            head = shared(head, call, vocab_start, *given)
        if head.backend == "reference" or support is not None or sparse_grad:
            log_probs, entropy = log_probs_of_head(
                rows,
                head,
                temperature,
                ids,
                inputs.layout.token_index,
                support,
                chunk_tokens,
                need_entropy,
                sparse_grad,
            )
            constant = checks.constant(entropy) if report_entropy else None
            out = loss_of(inputs, log_probs, entropy if has_bonus else constant)
            if call is not None:
                call.finish()
            return out
        chunk = check_chunk(chunk_tokens, count, head)
        return _in_one_pass(rows, head, temperature, inputs, report_entropy, ids, chunk)


def _with_layout(inputs: LossInputs, backend: Backend) -> LossInputs:
    """Return arguments with a layout; of a mask, it is made."""
    if inputs.mask is None:
        return inputs
    made = require_layout(StepLayout.from_mask(inputs.mask, backend=backend))
    constants = inputs.constants._replace(steps=made.steps)
    return inputs._replace(layout=made, mask=None, constants=constants)


def _facts(inputs: LossInputs) -> dict[str, object]:
    """Return what ranks that share a head must know alike of the objective."""
    layout, given = inputs.layout, inputs.constants
    assert layout is not None
    lengths = layout.step_lengths.tolist()
    # No text of all lengths: there may be many.
    of_steps = hashlib.sha256(repr(lengths).encode()).hexdigest()[:8]
    optional = [name for name, value in given._asdict().items() if value is None]
    return {
        "config": inputs.config,
        "steps": len(lengths),
        "lengths of steps": of_steps,
        "not given": ", ".join(optional),
        "advantages by token": given.advantages_per_token,
        "is_weights by token": given.is_weights_per_token,
    }


def _in_one_pass(
    rows: Tensor,
    head: Head,
    temperature: float | Tensor,
    inputs: LossInputs,
    report_entropy: bool,
    ids: Tensor,
    chunk: int,
) -> StepPOOutput:
    loss, metrics, step_log_ratio = _LinearStepPO.apply(
        rows,
        head.weight,
        head.bias,
        head,
        temperature if isinstance(temperature, Tensor) else None,
        _Steps(inputs, report_entropy),
        ids,
        chunk,
        torch.is_grad_enabled(),
    )
    return StepPOOutput(loss, Metrics(metrics, POLICY_METRICS, inputs.adds_up), step_log_ratio)


class _Steps:
    """The objective on action tokens alone, step by step: any range of steps is a range of rows."""

    def __init__(self, inputs: LossInputs, report_entropy: bool) -> None:
        """Gather what is given per token."""
        layout = inputs.layout
        assert layout is not None
        self.index = index = layout.token_index
        self.offsets = layout.step_offsets
        self.counts = layout.trajectory_counts
        # The only copy to the host that does not depend on the loss.
        self.borders: list[int] = self.offsets.tolist()
        self.has_bonus = inputs.config.entropy_coef != 0
        self.need_entropy = self.has_bonus or report_entropy

        def actions(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.view(-1)[index]

        given = inputs.constants
        total = given.normalizer
        if total is None:
            total = reduction_weights(
                layout.step_lengths, self.counts, inputs.config.reduction, torch.float64
            )[1]
        self.needs_center = inputs.config.ratio == "centered" and given.ratio_center is None
        advantages, weights = given.advantages, given.is_weights
        self.inputs = inputs._replace(shape=index.shape, layout=None)
        self.constants = given._replace(
            advantages=advantages.view(-1)[index] if given.advantages_per_token else advantages,
            old_log_probs=actions(given.old_log_probs),
            ref_log_probs=actions(given.ref_log_probs),
            is_weights=actions(weights) if given.is_weights_per_token else weights,
            normalizer=total,
        )

    def groups(self, chunk: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of steps of at most `chunk` tokens, or of one step that is longer."""
        begin, borders = 0, self.borders
        for step in range(1, len(borders)):
            if borders[step] - borders[begin] > chunk and step - 1 > begin:
                yield begin, step - 1
                begin = step - 1
        if len(borders) - 1 > begin:
            yield begin, len(borders) - 1

    def objective(self, begin: int, end: int) -> LossInputs:
        """Return the objective of steps `begin` to `end`, with rows as positions."""
        first, last = self.borders[begin], self.borders[end]
        every = self.constants

        def tokens(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[first:last]

        def steps(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[begin:end]

        offsets = self.offsets[begin : end + 1] - first
        rows = torch.arange(last - first, device=offsets.device)
        number = torch.arange(end - begin, device=offsets.device, dtype=torch.int32)
        step_ids = torch.repeat_interleave(number, offsets.diff(), output_size=last - first)
        advantages = (tokens if every.advantages_per_token else steps)(every.advantages)
        assert advantages is not None
        constants = every._replace(
            steps=Steps(step_ids, rows, offsets, offsets[:-1], self.counts[begin:end]),
            advantages=advantages,
            old_log_probs=tokens(every.old_log_probs),
            ref_log_probs=tokens(every.ref_log_probs),
            is_weights=(tokens if every.is_weights_per_token else steps)(every.is_weights),
            step_weights=steps(every.step_weights),
            clip_low=steps(every.clip_low),
            clip_high=steps(every.clip_high),
        )
        return self.inputs._replace(shape=rows.shape, constants=constants)


class _Pass:
    """One evaluation of the loss and its gradients."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        steps: _Steps,
        token_ids: Tensor,
        chunk: int,
        needed: tuple[bool, bool, bool],
    ) -> None:
        """Allocate what is kept of all logits."""
        num_rows = len(steps.index)
        self.hidden, self.head, self.steps, self.token_ids = hidden, head, steps, token_ids
        self.chunk = chunk
        self.need_entropy = steps.need_entropy
        dtype = steps.inputs.dtype
        self.log_probs = hidden.new_empty(num_rows, dtype=dtype)
        self.entropy = hidden.new_empty(num_rows if self.need_entropy else 0, dtype=dtype)
        groups = [(0, len(steps.counts))] if steps.needs_center else list(steps.groups(chunk))
        self.groups = groups if num_rows else []
        products = sum(
            -(-(steps.borders[end] - steps.borders[begin]) // chunk) for begin, end in self.groups
        )
        self.gradients = HeadGradients(head, hidden, needed, products, num_rows, scaled_later=True)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, metrics and step log-ratios; the gradients add up in `gradients`."""
        with self.head.buffer(min(self.chunk, len(self.steps.index))) as logits:
            for begin, end in self.groups:
                first, last = self.steps.borders[begin], self.steps.borders[end]
                if last - first <= self.chunk:
                    self._one_pass(begin, end, logits)
                else:
                    self._two_passes(begin, end, logits)
        every = self.steps.objective(0, len(self.steps.counts))
        entropy = self.entropy if self.need_entropy else None
        loss, metrics, step_log_ratio, *_ = run_operator(
            every, self.log_probs, entropy, False, False
        )
        return loss, metrics, step_log_ratio

    def _one_pass(self, begin: int, end: int, buffer: Tensor) -> None:
        """Handle steps whose logits fit into a chunk."""
        first, last = self.steps.borders[begin], self.steps.borders[end]
        if first == last:
            return
        rows = self._keep(first, last, buffer)
        if not self.gradients.any:
            return
        grad, grad_entropy, units = self._coefficients(begin, end)
        order = live_rows(grad, grad_entropy, self.head.backend, ascending=False)
        if len(order) == 0:
            return
        grad_logits = self.head.differentiate(rows, grad, grad_entropy, order)
        if units is not None:
            units = units[order]
        self.gradients.add(grad_logits, rows.hidden[order], rows.index[order], units)

    def _two_passes(self, begin: int, end: int, buffer: Tensor) -> None:
        """Handle steps whose logits do not fit: once for the log-probs, once for the gradients."""
        first, last = self.steps.borders[begin], self.steps.borders[end]
        for at in range(first, last, self.chunk):
            self._keep(at, min(at + self.chunk, last), buffer)
        if not self.gradients.any:
            return
        grad, grad_entropy, units = self._coefficients(begin, end)
        every = live_rows(grad, grad_entropy, self.head.backend, ascending=True)
        for live in every.split(self.chunk):
            if len(live) == 0:
                continue
            rows = self._evaluate(self.steps.index[first + live], buffer)
            grad_logits = self.head.differentiate(
                rows, grad[live], None if grad_entropy is None else grad_entropy[live]
            )
            self.gradients.add(
                grad_logits, rows.hidden, rows.index, None if units is None else units[live]
            )

    def _keep(self, first: int, last: int, buffer: Tensor) -> Evaluated:
        """Evaluate rows `first` to `last`, and keep what all of them have."""
        rows = self._evaluate(self.steps.index[first:last], buffer)
        self.log_probs[first:last] = rows.log_probs
        if self.need_entropy:
            self.entropy[first:last] = rows.entropy
        return rows

    def _evaluate(self, index: Tensor, buffer: Tensor) -> Evaluated:
        return self.head.evaluate(
            self.hidden[index], self.token_ids, index, self.need_entropy, buffer
        )

    def _coefficients(self, begin: int, end: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of the loss by log-probs and entropies of steps, and their units.

        Where gradients of logits could leave the range of fp16, those of each token are given as a
        multiple of a unit of its own.
        """
        first, last = self.steps.borders[begin], self.steps.borders[end]
        has_bonus = self.steps.has_bonus
        inputs = self.steps.objective(begin, end)
        _, _, _, grad, grad_entropy, scale = run_operator(
            inputs,
            self.log_probs[first:last],
            self.entropy[first:last] if has_bonus else None,
            True,
            has_bonus,
        )
        if not has_bonus:
            grad_entropy = None
        if not self.gradients.takes_units:
            if scale is None:
                return grad, grad_entropy, None
            return grad * scale, None if grad_entropy is None else grad_entropy * scale, None
        grad, grad_entropy, units = self.head.in_units(
            grad, grad_entropy, self.steps.index[first:last]
        )
        return grad, grad_entropy, (units if scale is None else units * scale).to(torch.float32)


class _LinearStepPO(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        temperature: Tensor | None,
        steps: _Steps,
        token_ids: Tensor,
        chunk: int,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        for_hidden, for_weight, for_bias = (grad_enabled and n for n in ctx.needs_input_grad[:3])
        needed = (for_hidden, for_weight, for_bias)
        one = _Pass(hidden, head, steps, token_ids, chunk, needed)
        loss, metrics, step_log_ratio = one.run()
        grad_hidden, grad_weight, grad_bias = one.gradients.finish()
        save(ctx, temperature, hidden=grad_hidden, weight=grad_weight, bias=grad_bias)
        # Without rows: a link to the graphs of the inputs that keeps none of their memory.
        with torch.enable_grad():
            keep_inputs(
                ctx, *(None if x is None else x[:0].clone() for x in (hidden, weight, bias))
            )
        ctx.dtype, ctx.backend = weight.dtype, head.backend
        ctx.mark_non_differentiable(metrics, step_log_ratio)
        return loss, metrics, step_log_ratio

    @staticmethod
    @first_only(_NAME, kept_inputs)
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
        gradients = (
            grad
            if grad is None
            else scaled_gradient(ctx.backend, grad, grad_loss, None, grad.shape, ctx.dtype)
            for grad in saved(ctx)
        )
        return *gradients, None, None, None, None, None, None
