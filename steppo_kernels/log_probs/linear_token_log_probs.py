"""Log-probs and entropies of tokens from hidden states and the output head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends.choice import Backend, resolve
from ..backends.derivatives import first_only
from ..backends.saved import save, saved
from ..backends.untraced import untraced
from .kept_rows import check_support, rows_of
from .lm_head import Head, HeadGradients, check_chunk, check_head, live_rows
from .plain_head import plain_log_probs
from .sharded_head import again, localized, on_shards, shared
from .supported_head import kept_log_probs
from .targets import entropy_shape, ids_of, one_id, token_shape
from .token_support import TokenSupport

_NAME = "linear_token_log_probs"


@untraced
def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    support: TokenSupport | None = None,
    sparse_grad: bool = False,
    chunk_tokens: int | None = None,
    tp_group: Any = None,
    vocab_start: int | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return `token_log_probs` of ``hidden @ weight.T + bias`` without ever having those logits.

    Rows are taken in chunks; of their logits, only log-sum-exps (and entropies) are kept. Backward
    forms them again, for the rows whose upstream gradient is not 0: 2 + 6f times M d V operations,
    with f the share of those among the M rows of `mask`. Without gradients (``torch.no_grad()``,
    for the old and the reference policy) it is 2. `torch.compile` breaks its graph here.

    With `tp_group`, each of its ranks has the hidden states of all tokens and some rows of the
    weight, and all get the same bits of log-probs. The ranks exchange a few numbers of each row of
    a chunk, and backward adds up the gradient of the hidden states: no logits and no weights are
    sent. Forward and backward each take 1 collective for what the ranks were given, 1 for each
    chunk, and 1 in the end that says that none failed; backward takes 1 more for that sum. The
    reference forms all rows at once, and its backward is autograd's: 1 collective and the sum.

    Args:
        hidden: ``[..., d]``, fp32, fp64, fp16 or bf16; position i predicts ``token_ids[i]``.
        weight: ``[V, d]`` in the dtype of `hidden` (under autocast both are cast, but not fp64);
            may be strided, tied to an embedding or frozen.
        token_ids: int ``[...]``, in the shapes that `token_log_probs` takes; or ``[..., K]`` for K
            ids of each token, which may come twice: all of them from one pass.
        bias: ``[V]``.
        temperature: above 0, what logits are divided by; a number, or one for each token.
        softcap: logits become ``softcap * tanh(logits / softcap)`` first; 1e-30 to 1e30.
        mask: bool or 0/1 ``[...]``; other rows cost nothing, and their results and gradients are 0.
            Their number is copied to the host.
        return_entropy: also return the entropies, differentiable as the log-probs are.
        support: the ids that each token could be sampled from, of the token shape or flat: the
            softmaxes are over these. Rows of the weight are gathered for each token: 6 d operations
            for each kept id instead of 6 d V for each token, all in one pass. Where 4 times the
            ids of all sets are more than V for each token, products with the whole weight take
            their place, in chunks. On a GPU that is 256 times, by a count that has not been
            measured, and includes the sets of masked tokens.
        sparse_grad: with `support`, return the gradients of weight and bias as sparse COO tensors
            of the rows that are kept, for optimizers that take these. Every token must have a set,
            and weight and bias must be leaves. The reference backend has no use for it.
        chunk_tokens: rows of a chunk; None picks as `linear_steppo_loss` does.
        tp_group: the ranks that the vocabulary is split over: a process group or a `DeviceMesh` of
            one dimension. `weight` and `bias` are then this rank's rows, ``[V_r, d]`` and
            ``[V_r]`` with V_r of at least 0, as plain tensors or as DTensors that are placed as
            ``Shard(0)``; their gradients stay on their rank. Everything else is the same on all
            ranks. Each rank gets the whole gradient of `hidden`.
        vocab_start: the first id of this rank's rows; None if they lie in the order of the ranks.
        backend: implementation of what is not a matrix product.

    Returns:
        fp32 (fp64 for fp64 inputs) of the shape of `token_ids`; with `return_entropy` a pair. Of K
        ids a token, entropies have the token shape.

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: in backward, where an input was changed in place since the forward pass, and
            for second derivatives; with `tp_group`, where another rank raised.

    Example:
        >>> import torch
        >>> from steppo_kernels import linear_token_log_probs
        >>> hidden = torch.ones(2, 3)
        >>> weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
        >>> linear_token_log_probs(hidden, weight, torch.tensor([0, 1]))
        tensor([-1.3133, -0.3133])
    """
    with on_shards(_NAME, tp_group, vocab_start) as call:
        checks.switch("return_entropy", return_entropy)
        checks.switch("sparse_grad", sparse_grad)
        if call is not None:
            hidden, weight, bias, vocab_start = localized(
                hidden, weight, bias, vocab_start, call.ranks
            )
        hidden = checks.floating("hidden", hidden)
        shape, device = token_shape(token_ids, hidden.shape[:-1]), hidden.device
        if mask is not None:
            mask = checks.row_mask("mask", mask, shape, device)
        chosen, is_shard = resolve(backend, device), call is not None
        tokens, head = check_head(
            hidden,
            weight,
            bias,
            temperature,
            softcap,
            shape,
            mask,
            chosen,
            is_shard=is_shard,
            sparse_grad=sparse_grad,
        )
        ids = ids_of(token_ids, shape, device)
        for name, value in (("support", support), ("tp_group", tp_group)):
            if value is not None:
                one_id(ids, name)
        every = torch.arange(len(tokens), device=device)
        index = every if mask is None else mask.nonzero().squeeze(1)
        if support is not None:
            support = check_support(support, shape, device)
        if call is not None:
            given = tokens, chunk_tokens, len(index), return_entropy, support
            head = shared(head, call, vocab_start, *given)
        log_probs, entropy = log_probs_of_head(
            tokens,
            head,
            temperature,
            ids,
            index,
            support,
            chunk_tokens,
            return_entropy,
            sparse_grad,
        )
        if call is not None:
            call.finish()
    of_tokens = entropy_shape(token_ids, hidden.shape[:-1])
    log_probs = log_probs.view(token_ids.shape)
    return (log_probs, entropy.view(of_tokens)) if return_entropy else log_probs


def log_probs_of_head(
    hidden: Tensor,
    head: Head,
    temperature: float | Tensor,
    token_ids: Tensor,
    index: Tensor,
    support: TokenSupport | None,
    chunk_tokens: int | None,
    need_entropy: bool,
    sparse_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies ``[N]`` of checked arguments, 0 except at `index`.

    `temperature` is the caller's, which may not change before backward.
    """
    rows = None
    if support is not None:
        rows = rows_of(support, token_ids, index, head.vocabulary)
    if sparse_grad and (rows is None or len(rows.full)):
        raise ValueError(
            "sparse_grad: got it "
            + ("without support" if rows is None else f"with {len(rows.full)} tokens over all ids")
            + ", expected a set of every token: the gradient has all rows"
        )
    if head.backend == "reference":
        log_probs, entropy = plain_log_probs(hidden, head, token_ids, index, rows)
        return log_probs, entropy if need_entropy else entropy[:0]
    found = []
    if rows is not None and (len(rows.kept) or not len(rows.full)):
        found.append(
            kept_log_probs(
                hidden,
                head,
                temperature,
                token_ids,
                rows,
                chunk_tokens,
                need_entropy,
                sparse_grad,
            )
        )
        index = rows.full
    if len(index) or rows is None:
        found.append(
            _LinearTokenLogProbs.apply(
                hidden,
                head.weight,
                head.bias,
                head,
                temperature if isinstance(temperature, Tensor) else None,
                token_ids,
                index,
                check_chunk(chunk_tokens, len(index), head),
                need_entropy,
            )
        )
    if len(found) == 1:
        return found[0]
    # Each is 0 where the other one is not.
    (log_probs, entropy), (others, other_entropy) = found
    return log_probs + others, entropy + other_entropy


class _LinearTokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        temperature: Tensor | None,
        token_ids: Tensor,
        index: Tensor,
        chunk: int,
        need_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        log_probs = hidden.new_zeros(token_ids.shape, dtype=checks.compute_dtype(hidden))
        entropy = log_probs.new_zeros(len(token_ids) if need_entropy else 0)
        with head.buffer(min(chunk, len(index))) as buffer:
            for part in index.split(chunk) if len(index) else ():
                rows = head.evaluate(hidden[part], token_ids, part, need_entropy, buffer)
                log_probs[part] = rows.log_probs
                if need_entropy:
                    entropy[part] = rows.entropy
        save(
            ctx,
            temperature,
            hidden=hidden,
            weight=weight,
            bias=bias,
            temperature=head.temperatures,
            token_ids=token_ids,
            index=index,
        )
        ctx.head, ctx.chunk = head, chunk
        ctx.set_materialize_grads(False)
        if not need_entropy:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @first_only(_NAME, lambda ctx: ctx.saved_tensors[:3])
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> Any:
        # The head of the forward pass, with the tensors that autograd has watched since.
        head: Head = ctx.head
        with again(_NAME, head.shard) as call:
            tensors: Any = saved(ctx)
            hidden, weight, bias, temperatures, token_ids, index = tensors
            head = head._replace(weight=weight, bias=bias, temperatures=temperatures)
            zeros = torch.zeros_like(token_ids, dtype=checks.compute_dtype(hidden))
            c = (zeros if grad is None else grad)[index]
            e = None if grad_entropy is None else grad_entropy[index]
            live = live_rows(c, e, head.backend, ascending=True)
            if call is not None and head.shard is not None:
                facts = {"rows with a gradient": len(live), "gradient of entropy": e is not None}
                call.agree(facts)
                shard = head.shard._replace(call=call)
                shard.open(min(ctx.chunk, len(live)), e is not None, hidden.device)
                head = head._replace(shard=shard)
            gradients = _gradients(ctx, head, hidden, token_ids, index, live, c, e)
        return *gradients, None, None, None, None, None, None


def _gradients(
    ctx: Any,
    head: Head,
    hidden: Tensor,
    token_ids: Tensor,
    index: Tensor,
    live: Tensor,
    c: Tensor,
    e: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of hidden states, weight and bias.

    The rows `live` of `index` have the upstream gradients c and e, of log-probs and entropies.
    """
    chunks = -(-len(live) // ctx.chunk)
    needed = ctx.needs_input_grad[:3]
    gradients = HeadGradients(head, hidden, needed, chunks, len(live), len(live))
    with head.buffer(min(ctx.chunk, len(live))) as buffer:
        for part in live.split(ctx.chunk) if len(live) else ():
            at = index[part]
            rows = head.evaluate(hidden[at], token_ids, at, e is not None, buffer)
            of_log_probs, of_entropy = c[part], None if e is None else e[part]
            units = None
            if gradients.takes_units:
                of_log_probs, of_entropy, units = head.in_units(of_log_probs, of_entropy, at)
                units = units.to(torch.float32)
            grad_logits = head.differentiate(rows, of_log_probs, of_entropy)
            gradients.add(grad_logits, rows.hidden, at, units)
    return gradients.finish()
