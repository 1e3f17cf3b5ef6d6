"""The output head, a chunk of rows at a time: its logits, their log-probs, and its gradients.

Only the rows of a chunk ever have logits. Matrix products are torch's; what stands between them,
from logits to log-probs and from gradients of log-probs to gradients of logits, is one kernel each
(`steppo_kernels.token_log_probs`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..backends import operators
from ..backends.gpu.products import KEEPS_FP32
from ..backends.reference.token_log_probs import check_ids
from ..backends.reference.vocabulary_shard import gradient_without_token, local_ids
from .autocast import without_autocast
from .memory import KEPT_BYTES, scratch
from .several_ids import Several
from .targets import Targets
from .vocabulary_shard import HiddenRows, Shard, nothing, of_all
from .weight_gradient import CPU_SLICE, slice_rows, weight_gradient

# Logits of a chunk: few enough to leave memory to the model, and so many that the sum of the
# weight's gradient, which is read and written for each chunk, costs little next to the products.
_CPU_BYTES, _GPU_SHARE = KEPT_BYTES, 16
_MIN_ROWS = 128
# Numbers that rows of logits on a GPU are a multiple of.
_ALIGNED = 8
# Gradients of logits are scaled to about 2 to this power where they are fp16.
_UNIT_BITS = 4


class Head(NamedTuple):
    """A linear output head, checked.

    Attributes:
        weight: ``[V, d]``; of a shard, its rows.
        bias: ``[V]`` or None.
        temperatures: fp64 ``[N]``, or None: then `temperature` is that of all rows.
        softcap: logits are capped to +- this before they are divided; 0 is off.
        backend: what runs the row kernels.
        shard: which part of the vocabulary these rows are; None if they are all.
    """

    weight: Tensor
    bias: Tensor | None
    temperatures: Tensor | None
    temperature: float
    softcap: float
    backend: str
    shard: Shard | None = None

    @property
    def vocabulary(self) -> int:
        """How many ids there are, on all ranks together."""
        return len(self.weight) if self.shard is None else self.shard.vocabulary

    def temperature_of(self, index: Tensor) -> float | Tensor:
        """Return the temperature of the tokens at `index`: fp64 ``[n]``, or a number for all."""
        return self.temperature if self.temperatures is None else self.temperatures[index]

    def buffer(self, rows: int) -> AbstractContextManager[Tensor]:
        """Lend uninitialised memory for the logits of `rows` rows, and perhaps a few more columns.

        On a GPU rows begin at multiples of 32 bytes: kernels and products move 16 at once, also
        where gradients in half precision take the first half of a row.
        """
        dtype = logits_dtype(self.backend, self.weight.dtype)
        count = len(self.weight)
        columns = count if self.backend == "cpu" else -(-count // _ALIGNED) * _ALIGNED
        return scratch((rows, columns), dtype, self.weight.device)

    @without_autocast
    def evaluate(
        self, hidden: Tensor, token_ids: Tensor, index: Tensor, need_entropy: bool, buffer: Tensor
    ) -> Evaluated:
        """Return what ``[n, d]`` hidden states, of the flat positions `index`, give.

        Their logits take the first n rows of `buffer`. With a shard, that is one collective, and
        a token has one id.
        """
        logits = buffer[: len(hidden), : len(self.weight)]
        ids, is_away, several = token_ids[index], None, None
        if ids.dim() == 2:
            operators.call("head_logits", self.backend, logits, hidden, self.weight, self.bias)
            several = Several.of(logits.unsqueeze(0), ids, None, checks.compute_dtype(hidden))
            ids = several.target
        elif self.shard is not None:
            check_ids(ids, self.vocabulary)
            ids, is_away = local_ids(ids, self.shard.start, self.shard.size)
        temperatures = None if self.temperatures is None else self.temperatures[index]
        targets = Targets(ids, None, temperatures, self.temperature, self.softcap)
        if len(self.weight):
            if several is None:
                operators.call("head_logits", self.backend, logits, hidden, self.weight, self.bias)
            found = operators.call(
                "token_log_probs", self.backend, logits.unsqueeze(0), *targets, need_entropy
            )
        else:
            found = nothing(len(hidden), checks.compute_dtype(hidden), hidden.device)
        if self.shard is not None:
            assert is_away is not None
            found = of_all(self.shard, found, is_away, self.temperature_of(index), need_entropy)
        log_probs, entropy, top, log_sum = found
        if several is not None:
            scales = self.temperature_of(index), self.softcap
            log_probs = several.log_probs(log_probs, top, log_sum, *scales)
        return Evaluated(
            hidden, index, logits, targets, log_probs, entropy, top, log_sum, is_away, several
        )

    def differentiate(
        self,
        rows: Evaluated,
        grad_log_probs: Tensor,
        grad_entropy: Tensor | None,
        order: Tensor | None = None,
    ) -> Tensor:
        """Overwrite logits with their gradients: of all rows, or the first n with those of `order`.

        `order` ``[n]`` is as `live_rows` returns it where it need not ascend. The gradients have
        the dtype of the weight; where that is narrower, they take the first half of each row's
        memory.
        """
        several, of_rows = rows.several, grad_log_probs
        if several is not None:
            of_rows = several.of_rows(grad_log_probs)
        first = self._away_from(rows, of_rows, grad_entropy)
        logits = grad_logits = rows.logits
        if logits.dtype != self.weight.dtype:
            grad_logits = logits.view(self.weight.dtype)[:, : logits.shape[1]]
        if len(self.weight):
            operators.call(
                "token_log_probs_backward",
                self.backend,
                grad_logits.unsqueeze(0),
                logits.unsqueeze(0),
                *rows.targets,
                rows.top,
                rows.log_sum,
                None if grad_entropy is None else rows.entropy,
                of_rows,
                grad_entropy,
                order,
            )
        if several is not None:
            several.write_columns(
                grad_logits.unsqueeze(0),
                rows.log_probs,
                grad_log_probs,
                grad_entropy,
                rows.entropy,
                None,
                self.temperature_of(rows.index),
                self.softcap,
            )
        grad_logits = grad_logits if order is None else grad_logits[: len(order)]
        if first is not None and rows.is_away is not None:
            is_away = rows.is_away
            if order is not None:
                first, is_away = first[order], is_away[order]
            column = grad_logits[:, 0]
            column.copy_(torch.where(is_away, first.to(column.dtype), column))
        return grad_logits

    def _away_from(
        self, rows: Evaluated, grad_log_probs: Tensor, grad_entropy: Tensor | None
    ) -> Tensor | None:
        """Return the gradients of the first column ``[n]`` where the token is on another rank.

        Kernels know rows with their token. Of the others they are told that it is this column.
        """
        if rows.is_away is None or not len(self.weight):
            return None
        return gradient_without_token(
            rows.logits[:, 0],
            self.temperature_of(rows.index),
            self.softcap,
            rows.top,
            rows.log_sum,
            None if grad_entropy is None else rows.entropy,
            grad_log_probs,
            grad_entropy,
        )

    def in_units(
        self, grad_log_probs: Tensor, grad_entropy: Tensor | None, index: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the gradients of the tokens at `index` as multiples of units, and these (fp64).

        A unit is a power of 2 of the size of the token's gradients of logits: given in it they use
        the range of fp16. The largest are between 1 and about 200, those of a probability of
        1e-5 are normal numbers. One unit for all would be that of short steps, and the gradients of
        a long step are smaller by its length.
        """
        size = grad_log_probs.abs().to(torch.float64)
        if size.dim() == 2:
            size = size.amax(1)
        if grad_entropy is not None:
            size = torch.maximum(size, grad_entropy.abs())
        size = size / self.temperature_of(index)
        # What is not finite stays as it is. Every fp32 number has a reciprocal in fp64.
        exponent = torch.frexp(torch.where(size.isfinite(), size, 1.0)).exponent
        units = torch.ldexp(torch.ones_like(size), exponent - _UNIT_BITS)

        def scaled(grad: Tensor) -> Tensor:
            return (grad / (units if grad.dim() == 1 else units.unsqueeze(1))).to(grad.dtype)

        return scaled(grad_log_probs), None if grad_entropy is None else scaled(grad_entropy), units


@dataclass(frozen=True, eq=False)
class Evaluated:
    """Rows of a head and what they gave.

    The gradient takes sums and logits of one evaluation: a product of other rows beside them may
    round differently, and what is left of a confident token's gradient is smaller than that.

    Attributes:
        hidden, index: hidden states ``[n, d]`` and their flat positions.
        logits: ``[n, V]``, in memory that the next evaluation overwrites.
        targets: what was taken from them.
        log_probs, entropy: ``[n]``; entropy is empty where it was not needed.
        top, log_sum: fp64 ``[n]``, what backward needs.
        is_away: bool ``[n]``, whether the token is on another rank; None without a shard.
        several: the ids of tokens that have K of them, with log-probs ``[n, K]``; else None.
    """

    hidden: Tensor
    index: Tensor
    logits: Tensor
    targets: Targets
    log_probs: Tensor
    entropy: Tensor
    top: Tensor
    log_sum: Tensor
    is_away: Tensor | None
    several: Several | None


class HeadGradients:
    """Gradients of a loss through the head, summed over chunks.

    Attributes:
        takes_units: whether gradients of logits are given in units (`Head.in_units`), because fp16
            may not hold them as they are. Products are then formed in fp32. On a CPU that costs
            nothing, as few CPUs multiply fp16.
        keeps_fp32: whether `finish` returns fp32, as what comes later may bring it into the range.
    """

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        needed: tuple[bool, bool, bool],
        num_chunks: int,
        most_rows: int,
        num_rows: int | None = None,
        *,
        scaled_later: bool = False,
    ) -> None:
        """Start with nothing; `needed` says which of hidden, weight and bias want a gradient.

        There are at most `num_chunks` chunks and `most_rows` rows in them, and `num_rows` if that
        is known yet.
        With `scaled_later` the upstream gradient is not known yet: then sums stay in fp32 where the
        dtype is fp16, whose range asks for that gradient first.
        """
        self.head = head
        need_hidden, need_weight, need_bias = needed
        weight = head.weight
        is_fp16 = weight.dtype == torch.float16
        self.keeps_fp32 = scaled_later and is_fp16
        self.takes_units = is_fp16 and (scaled_later or weight.device.type == "cpu")
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.hidden = self.weight = self.bias = None
        self._rows: HiddenRows | None = None
        if need_hidden:
            self.hidden = torch.zeros_like(hidden, dtype=wide if self.keeps_fp32 else hidden.dtype)
            if head.shard is not None:
                self._rows = HiddenRows(head.shard.call.ranks, most_rows, hidden)
        if need_weight:
            self.weight = weight_gradient(
                weight, head.backend, num_chunks, num_rows, takes_units=self.takes_units
            )
        if need_bias:
            self.bias = torch.zeros(len(weight), dtype=wide, device=weight.device)

    @property
    def any(self) -> bool:
        """Whether a gradient is wanted at all."""
        return not (self.hidden is None and self.weight is None and self.bias is None)

    @without_autocast
    def add(
        self, grad_logits: Tensor, hidden: Tensor, index: Tensor, units: Tensor | None = None
    ) -> None:
        """Add the products of ``[n, V]`` gradients of the tokens at `index`.

        Row i of the gradients is given as a multiple of ``units[i]`` (fp32).
        """

        def in_full(rows: Tensor) -> Tensor:
            return rows if units is None else rows.to(torch.float32) * units.unsqueeze(1)

        if self.hidden is not None:
            product = in_full(self._hidden_product(grad_logits))
            if self._rows is not None:
                self._rows.add(product, index)
            else:
                self.hidden.index_copy_(0, index, product.to(self.hidden.dtype))
        if self.bias is not None:
            if units is None:
                self.bias += grad_logits.sum(0, dtype=self.bias.dtype)
            else:
                part = slice_rows(grad_logits)
                for entries, columns in zip(
                    self.bias.split(part), grad_logits.split(part, dim=1), strict=True
                ):
                    entries += units @ columns.to(units.dtype)
        if self.weight is not None:
            # Units differ from row to row: a sum over rows takes them in, and is formed in fp32.
            self.weight.add(grad_logits, in_full(hidden))

    def _hidden_product(self, grad_logits: Tensor) -> Tensor:
        weight = self.head.weight
        # What ranks add up is rounded once, after the sum.
        is_part = self._rows is not None and weight.dtype in checks.HALF_DTYPES
        is_wide = self.takes_units or is_part
        if not is_wide or (grad_logits.is_cuda and not KEEPS_FP32):
            return torch.mm(grad_logits, weight)
        if grad_logits.is_cuda:
            return torch.mm(grad_logits, weight, out_dtype=torch.float32)
        sums = weight.new_zeros((len(grad_logits), weight.shape[1]), dtype=torch.float32)
        for columns, part in zip(
            grad_logits.split(CPU_SLICE, dim=1), weight.split(CPU_SLICE), strict=True
        ):
            sums.addmm_(columns.to(sums.dtype), part.to(sums.dtype))
        return sums

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of hidden states, weight and bias.

        They have the dtypes of the inputs, or are fp32 (`keeps_fp32`). Those of hidden states are
        added up over the ranks of a shard, after all of them have come here.
        """
        if self.head.shard is not None:
            self.head.shard.call.finish(0 if self._rows is None else len(self._rows))
        if self._rows is not None and self.hidden is not None:
            self._rows.finish(self.hidden)
        weight = None if self.weight is None else self.weight.finish()
        bias = self.bias
        if not self.keeps_fp32:
            weight = None if weight is None else weight.to(self.head.weight.dtype)
            bias = None if bias is None else bias.to(self.head.weight.dtype)
        return self.hidden, weight, bias


def logits_dtype(backend: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a backend forms the logits of a head of `dtype`.

    Products of half precisions are kept in the fp32 that they are summed in: rounded, they move
    log-probs by more than a step ratio is clipped at.
    """
    is_kept = backend == "cpu" or (backend in ("triton", "cuda") and KEEPS_FP32)
    return torch.promote_types(dtype, torch.float32) if is_kept else dtype


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    shape: torch.Size,
    mask: Tensor | None,
    backend: str,
    *,
    is_shard: bool = False,
    sparse_grad: bool = False,
) -> tuple[Tensor, Head]:
    """Return hidden states ``[N, d]`` and the head; under autocast, both in its dtype.

    Temperatures are of the token shape; where `mask` (bool ``[N]``) is False they may be anything.
    With `is_shard`, the head may have no row. With `sparse_grad`, it gets sparse gradients.
    """
    hidden = checks.floating("hidden", hidden)
    device = hidden.device
    weight = checks.floating("weight", weight, device)
    checks.dims("weight", weight, (2,))
    sizes = weight.shape[1:] if is_shard else weight.shape
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] or 0 in sizes:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)} with hidden of shape {tuple(hidden.shape)}, "
            "expected [V, d] with [..., d], V and d above 0"
        )
    if bias is not None:
        bias = checks.floating("bias", bias, device)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias: got shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}"
            )
    if sparse_grad and torch.is_grad_enabled():
        _check_leaves(weight, bias)
    softcap = 0.0 if softcap is None else checks.positive_number("softcap", softcap)
    # Kernels divide by it in fp32.
    if softcap and not 1e-30 <= softcap <= 1e30:
        raise ValueError(f"softcap: got {softcap!r}, expected a number from 1e-30 to 1e30")
    # As in torch's own products, double precision stays.
    if torch.is_autocast_enabled(device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
        cast = _Cast.apply if sparse_grad else torch.Tensor.to
        hidden, weight = hidden.to(dtype), cast(weight, dtype)
        bias = None if bias is None else cast(bias, dtype)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(
                f"{name}: got {value.dtype}, expected {hidden.dtype}, the dtype of hidden"
            )
    temperatures, number = checks.temperature("temperature", temperature, shape, device, mask)
    return (
        hidden.reshape(-1, hidden.shape[-1]),
        Head(weight, bias, temperatures, number, float(softcap), backend),
    )


class _Cast(torch.autograd.Function):
    """``to`` of a tensor whose gradient may be sparse, which torch's own cannot be."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = value.dtype
        return value.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.to(ctx.dtype), None


def _check_leaves(weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.requires_grad and not value.is_leaf:
            raise ValueError(
                f"sparse_grad: got a {name} that is a view or the result of an operation, expected "
                "a leaf: operations of torch do not hand sparse gradients on"
            )


def check_chunk(chunk_tokens: int | None, num_rows: int, head: Head) -> int:
    """Return the rows of a chunk: as given, or as many as fit into a share of the memory.

    Not of what is free: results would differ in their last bits from call to call. Of a shard, the
    whole vocabulary counts: all ranks have the same chunks.
    """
    if chunk_tokens is None:
        chunk_tokens = rows_within(chunk_budget(head.weight.device), head)
    return max(1, min(checks.count("chunk_tokens", chunk_tokens), num_rows))


def chunk_budget(device: torch.device) -> int:
    """Return how many bytes the logits of a chunk take where nothing else is said."""
    if device.type != "cuda":
        return _CPU_BYTES
    return int(torch.cuda.get_device_properties(device).total_memory // _GPU_SHARE)


def rows_within(budget: int, head: Head) -> int:
    """Return how many rows have logits of at most `budget` bytes, if not fewer than is sensible."""
    rows = budget // (head.vocabulary * logits_dtype(head.backend, head.weight.dtype).itemsize)
    return max(_MIN_ROWS, rows - rows % 64)


def live_rows(
    grad_log_probs: Tensor, grad_entropy: Tensor | None, backend: str, *, ascending: bool
) -> Tensor:
    """Return the positions of the rows with a gradient, in an order of `order_live_rows`.

    The gradients of log-probs are ``[n]`` or ``[n, K]``.
    With `ascending` they ascend. Without, entry j of n is j or at least n: the gradient of row
    ``order[j]`` can then be written to row j while others are read, as the rows that make room are
    dead.
    """
    if grad_log_probs.dim() == 2:
        # NaN is not 0 either.
        grad_log_probs = (grad_log_probs != 0).any(1).to(grad_log_probs.dtype)
    order: Tensor
    order, count = operators.call(
        "order_live_rows", backend, grad_log_probs, grad_entropy, ascending
    )
    # The one number that a chunk copies to the host. An asynchronous copy would gain nothing: what
    # is launched next has so many rows.
    return order[: int(count)]
