"""Log-probs of a head over kept sets, from the rows of the weight that they keep.

The logits of the pairs of a token and an id are all that is formed, and backward keeps them. Where
sets are so large that gathering rows costs more than products with the whole weight, these give the
logits instead.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, csr
from ..backends import operators
from ..backends.derivatives import first_only
from ..backends.records import MOST_ROW_BYTES
from ..backends.saved import save, saved
from .kept_rows import KeptRows
from .kept_sets import KeptSets
from .lm_head import Head, HeadGradients, check_chunk
from .memory import gradient, scratch
from .sharded_head import again
from .vocabulary_shard import HiddenRows, of_all

_NAME = "support"
# How many times as long a row of the weight takes that is gathered for one token, as one that is
# multiplied with all tokens; on a GPU (True) and elsewhere.
BREAK_EVEN = {False: 4, True: 256}
# Tokens that keep an id, on average, from which on a CPU takes pairs in the order of their ids.
_SHARED = 4


class _Kept(NamedTuple):
    """What a call knows of its tokens and their sets.

    Attributes:
        rows: the tokens.
        held: the ids of their sets that this rank has, all of them without a shard.
        places: int64 ``[n]``, where in these each token has its own id, -1 if nowhere.
        chunk: rows of a product with the whole weight; None if rows of the weight are gathered.
        sizes: the pairs of each of these chunks.
        sparse: whether the gradient of the weight has only the rows that are kept.
    """

    rows: KeptRows
    held: KeptSets
    places: Tensor
    chunk: int | None
    sizes: list[int]
    sparse: bool

    def by_id(self, backend: str) -> tuple[Tensor, ...]:
        """Return the index of ids if a CPU is to take pairs in its order."""
        held = self.held
        if backend != "cpu" or self.rows.num_pairs() < self.rows.held.num_pairs:
            return ()
        # Fewer pairs are not worth an index, if nothing else needs it.
        index = held.by_id
        return index if held.num_pairs >= _SHARED * len(index.ids) else ()


def kept_log_probs(
    hidden: Tensor,
    head: Head,
    temperature: float | Tensor,
    token_ids: Tensor,
    rows: KeptRows,
    chunk_tokens: int | None,
    need_entropy: bool,
    sparse_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies ``[N]`` of ``[N, d]`` hidden states, 0 but at `rows.kept`.

    `temperature` is the caller's. The ids of `token_ids` are those of the whole vocabulary.
    """
    held, places = rows.held, rows.places
    if head.shard is not None:
        held = held.within(head.shard.start, head.shard.size)
        places = held.places(token_ids - head.shard.start, rows.kept)
    chunk, sizes = None, []
    if takes_products(head, rows) and not sparse_grad:
        chunk = check_chunk(chunk_tokens, len(rows.kept), head)
        sizes = _pairs_of_chunks(held, rows, chunk)
    if head.weight.stride(1) != 1:
        head = head._replace(weight=head.weight.contiguous())
    if head.bias is not None:
        head = head._replace(bias=head.bias.contiguous())
    found: tuple[Tensor, Tensor] = _KeptLogProbs.apply(
        hidden.contiguous(),
        head.weight,
        head.bias,
        head,
        temperature if isinstance(temperature, Tensor) else None,
        _Kept(rows, held, places, chunk, sizes, sparse_grad),
        need_entropy,
    )
    return found


def takes_products(head: Head, rows: KeptRows) -> bool:
    """Return whether products with the whole weight are cheaper than gathering its rows."""
    ratio = BREAK_EVEN[head.weight.device.type == "cuda"]
    return rows.num_pairs() * ratio > len(rows.kept) * head.vocabulary


class _KeptLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        temperature: Tensor | None,
        kept: _Kept,
        need_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype, rows = checks.compute_dtype(hidden), kept.rows
        logits = hidden.new_empty(kept.held.num_pairs, dtype=dtype)
        directions = None
        if ctx.needs_input_grad[0] and not need_entropy and _is_attention(head, kept):
            directions = logits.new_empty((len(rows.kept), hidden.shape[1]))
            _attend(head, hidden, kept, logits, directions)
        else:
            (_multiply if kept.chunk is None else _multiply_all)(head, hidden, kept, logits)
        temperatures = None if head.temperatures is None else head.temperatures[rows.kept]
        found = operators.call(
            "kept_log_probs",
            head.backend,
            logits,
            kept.places,
            rows.kept,
            kept.held.sets,
            temperatures,
            head.temperature,
            head.softcap,
            need_entropy,
        )
        if head.shard is not None:
            scale = head.temperature_of(rows.kept)
            found = of_all(head.shard, found, kept.places < 0, scale, need_entropy)
        of_rows, of_sets, top, log_sum = found
        log_probs = logits.new_zeros(len(hidden))
        log_probs[rows.kept] = rows.marked(of_rows)
        entropy = log_probs.new_zeros(len(hidden) if need_entropy else 0)
        if need_entropy:
            entropy[rows.kept] = rows.marked(of_sets)
        save(
            ctx,
            temperature,
            hidden=hidden,
            weight=weight,
            bias=bias,
            temperature=head.temperatures,
            logits=logits,
            top=top,
            log_sum=log_sum,
            entropy=of_sets,
            directions=directions,
        )
        ctx.head, ctx.kept = head, kept
        ctx.set_materialize_grads(False)
        if not need_entropy:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @first_only(_NAME, lambda ctx: ctx.saved_tensors[:3])
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> Any:
        head: Head = ctx.head
        kept: _Kept = ctx.kept
        with again(_NAME, head.shard) as call:
            tensors: Any = saved(ctx)
            hidden, weight, bias, temperatures, logits, top, log_sum, entropy, directions = tensors
            head = head._replace(weight=weight, bias=bias, temperatures=temperatures)
            if call is not None and head.shard is not None:
                call.agree({"gradient of entropy": grad_entropy is not None})
                head = head._replace(shard=head.shard._replace(call=call))
                call.open(0, 1, hidden.device)
            at = kept.rows.kept
            c = logits.new_zeros(len(at)) if grad is None else grad[at]
            e = None if grad_entropy is None else grad_entropy[at]
            c = kept.rows.marked(c)
            h = None if e is None else entropy
            needed = ctx.needs_input_grad[:3]
            pass_ = _Backward(head, kept, hidden, logits, (top, log_sum, h), directions)
            run = pass_.by_rows if kept.chunk is None else pass_.by_products
            gradients = run(c, e, needed)
        return *gradients, None, None, None, None


class _Backward:
    """The gradients of a call."""

    def __init__(
        self,
        head: Head,
        kept: _Kept,
        hidden: Tensor,
        logits: Tensor,
        found: tuple[Tensor, Tensor, Tensor | None],
        directions: Tensor | None,
    ) -> None:
        self.head, self.kept, self.hidden = head, kept, hidden
        self.logits, self.found, self.directions = logits, found, directions

    def _grad_logits(self, c: Tensor, e: Tensor | None) -> Tensor:
        """Return the gradients of the logits of all pairs: 0 of tokens that are not of the call."""
        head, kept = self.head, self.kept
        at = kept.rows.kept
        make = torch.empty_like if kept.rows.covers_all else torch.zeros_like
        grad_logits = make(self.logits)
        temperatures = None if head.temperatures is None else head.temperatures[at]
        operators.call(
            "kept_log_probs_backward",
            head.backend,
            grad_logits,
            self.logits,
            kept.places,
            at,
            kept.held.sets,
            temperatures,
            head.temperature,
            head.softcap,
            *self.found,
            c.contiguous(),
            None if e is None else e.contiguous(),
        )
        return grad_logits

    def by_rows(
        self, c: Tensor, e: Tensor | None, needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return gradients from rows of the weight and of hidden states that are gathered."""
        shard, at = self.head.shard, self.kept.rows.kept
        grad_hidden = None
        if needed[0] and self.directions is not None:
            grad_hidden = self._scaled(self.directions, c)
            needed = False, *needed[1:]
            if not any(needed):
                return grad_hidden, None, None
        grad_logits = self._grad_logits(c, e)
        if needed[0]:
            grad_hidden = self._grad_hidden(grad_logits)
        of_weight = self._grad_weight(grad_logits, *needed[1:]) if any(needed[1:]) else None
        if shard is not None:
            shard.call.finish(len(at))
            if grad_hidden is not None:
                rows = HiddenRows(shard.call.ranks, len(at), self.hidden)
                rows.add(grad_hidden[at], at)
                grad_hidden = torch.zeros_like(self.hidden)
                rows.finish(grad_hidden)
        if of_weight is None:
            return grad_hidden, None, None
        return grad_hidden, *of_weight

    def _scaled(self, directions: Tensor, c: Tensor) -> Tensor:
        """Return the gradient of hidden states from those of the log-probs."""
        grad_hidden = self._new_grad_hidden(None)
        operators.call(
            "scale_directions",
            self.head.backend,
            grad_hidden,
            directions,
            c.contiguous(),
            self.kept.rows.kept,
        )
        return grad_hidden

    def _new_grad_hidden(self, dtype: torch.dtype | None) -> Tensor:
        """Return room for the gradient of hidden states: 0 where no operator writes."""
        make = self.hidden.new_empty if self.kept.rows.covers_all else self.hidden.new_zeros
        return make(self.hidden.shape, dtype=dtype)

    def _grad_hidden(self, grad_logits: Tensor) -> Tensor:
        head, kept = self.head, self.kept
        # What ranks add up is rounded once, after the sum.
        is_whole = head.shard is None
        grad_hidden = self._new_grad_hidden(None if is_whole else checks.compute_dtype(self.hidden))
        operators.call(
            "kept_hidden_gradient",
            head.backend,
            grad_hidden,
            grad_logits,
            head.weight,
            kept.rows.kept,
            kept.held.sets,
        )
        return grad_hidden

    def _grad_weight(
        self, grad_logits: Tensor, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of weight and bias, sparse ones if these are asked for."""
        kept, weight = self.kept, self.head.weight
        index, sparse = kept.held.by_id, kept.sparse
        # Without columns, the gradient of the bias is left.
        hidden = self.hidden if need_weight else self.hidden.new_empty((len(self.hidden), 0))
        shape = (len(index.ids) if sparse else len(weight), hidden.shape[1])
        make = torch.empty if sparse else gradient
        grad_weight = make(shape, dtype=hidden.dtype, device=hidden.device)
        grad_bias = grad_logits.new_empty(len(grad_weight)) if need_bias else None
        operators.call(
            "kept_weight_gradient",
            self.head.backend,
            grad_weight,
            grad_bias,
            grad_logits,
            hidden,
            index,
            sparse,
        )
        of_bias = None if grad_bias is None else grad_bias.to(hidden.dtype)
        if not sparse:
            return grad_weight if need_weight else None, of_bias
        ids = index.ids.long().unsqueeze(0)

        def spread(rows: Tensor, *size: int) -> Tensor:
            whole = (len(weight), *size)
            return torch.sparse_coo_tensor(
                ids, rows, whole, is_coalesced=True, check_invariants=False
            )

        return (
            spread(grad_weight, hidden.shape[1]) if need_weight else None,
            None if of_bias is None else spread(of_bias),
        )

    def by_products(
        self, c: Tensor, e: Tensor | None, needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return gradients from products with all of the weight."""
        head, kept, hidden, chunk = self.head, self.kept, self.hidden, self.kept.chunk
        assert chunk is not None
        at = kept.rows.kept
        gradients = HeadGradients(head, hidden, needed, -(-len(at) // chunk), len(at), len(at))
        units = None
        if gradients.takes_units:
            c, e, units = head.in_units(c, e, at)
            units = units.to(torch.float32)
        grad_logits = self._grad_logits(c, e).to(hidden.dtype)
        shape = (min(chunk, len(at)), len(head.weight))
        with scratch(shape, hidden.dtype, hidden.device) as buffer:
            parts = torch.arange(len(at), device=at.device).split(chunk)
            for part, size in zip(parts, kept.sizes, strict=True):
                dense, (row, pairs) = buffer[: len(part)].zero_(), _pairs(kept.held, at[part], size)
                dense[row, kept.held.sets.ids[pairs].long()] = grad_logits[pairs]
                gradients.add(
                    dense, hidden[at[part]], at[part], None if units is None else units[part]
                )
        return gradients.finish()


def _is_attention(head: Head, kept: _Kept) -> bool:
    """Return whether one read of the rows of the weight gives the gradients of hidden states too.

    A shard does not know the sums of the others, and the second read of a CPU is one of its caches.
    """
    row_bytes = head.weight.shape[1] * head.weight.element_size()
    is_gpu = head.backend not in ("cpu", "reference")
    return is_gpu and head.shard is None and kept.chunk is None and row_bytes <= MOST_ROW_BYTES


def _attend(head: Head, hidden: Tensor, kept: _Kept, logits: Tensor, directions: Tensor) -> None:
    """Write the logits of the pairs of a call, and the gradients of log-probs by hidden states."""
    at = kept.rows.kept
    operators.call(
        "kept_directions",
        head.backend,
        logits,
        directions,
        hidden,
        head.weight,
        head.bias,
        kept.places,
        at,
        kept.held.sets,
        None if head.temperatures is None else head.temperatures[at],
        head.temperature,
        head.softcap,
    )


def _multiply(head: Head, hidden: Tensor, kept: _Kept, logits: Tensor) -> None:
    """Write the logits of the pairs of a call, from rows of the weight."""
    operators.call(
        "kept_logits",
        head.backend,
        logits,
        hidden,
        head.weight,
        head.bias,
        kept.rows.kept,
        kept.held.sets,
        kept.by_id(head.backend),
    )


def _multiply_all(head: Head, hidden: Tensor, kept: _Kept, logits: Tensor) -> None:
    """Write the logits of the pairs of a call, from products with all of the weight."""
    chunk, at = kept.chunk, kept.rows.kept
    assert chunk is not None
    with head.buffer(min(chunk, len(at))) as buffer:
        for part, size in zip(at.split(chunk), kept.sizes, strict=True):
            dense = buffer[: len(part), : len(head.weight)]
            if len(head.weight):
                operators.call(
                    "head_logits", head.backend, dense, hidden[part], head.weight, head.bias
                )
            row, pairs = _pairs(kept.held, part, size)
            logits[pairs] = dense[row, kept.held.sets.ids[pairs].long()].to(logits.dtype)


def _pairs_of_chunks(held: KeptSets, rows: KeptRows, chunk: int) -> list[int]:
    """Return how many pairs each chunk of tokens has. A GPU is waited for once, or not at all."""
    size = len(rows.kept)
    if size == 0 or (rows.covers_all and size <= chunk):
        return [held.num_pairs if size else 0]
    upto = held.counts[rows.kept].cumsum(0)
    last = torch.arange(chunk, size + chunk, chunk, device=upto.device).clamp_(max=size) - 1
    ends = upto[last].tolist()
    return [end - begin for begin, end in itertools.pairwise([0, *ends])]


def _pairs(held: KeptSets, tokens: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the pairs of some tokens, `size` of them, and which of the tokens each belongs to."""
    counts = held.counts[tokens]
    every = torch.arange(len(tokens), device=tokens.device)
    row = torch.repeat_interleave(every, counts, output_size=size)
    return row, csr.ranges(held.sets.offsets[tokens], counts, size)
