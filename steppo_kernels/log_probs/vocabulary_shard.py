"""An output head whose vocabulary is split over the ranks of a tensor-parallel group.

Each rank has some rows of the weight, and the hidden states of all tokens. Of a chunk of tokens it
tells the others a few numbers a row, and all combine them alike, so that log-probs have the same
bits on all ranks: what is clipped, and which rows are live, is decided from these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from ..backends.derivatives import first_only, keep_inputs, kept_inputs
from ..backends.reference.vocabulary_shard import COLUMNS, combined, told_of_rows
from ..ranks import Call, Ranks


class Shard(NamedTuple):
    """The part of the vocabulary that this rank holds, in one call of all ranks.

    Attributes:
        call: what the ranks say to each other.
        start, size: its first id, and how many it has.
        vocabulary: how many ids all ranks have together.
    """

    call: Call
    start: int
    size: int
    vocabulary: int

    @staticmethod
    def agreed(call: Call, start: int | None, count: int, facts: Mapping[str, object]) -> Shard:
        """Return the shard of this rank after all ranks have said what they hold.

        Without `start`, parts lie in the order of the ranks.

        Raises:
            ValueError: the parts are not a whole; or ranks know different `facts`.
        """
        facts = {**facts, "vocab_start": "None" if start is None else "a number"}
        every = call.agree(facts, (0 if start is None else start, count))
        counts = [one[1] for one in every]
        starts = [one[0] for one in every]
        if start is None:
            starts = [sum(counts[:rank]) for rank in range(len(counts))]
        end = 0
        held = [(first, size) for first, size in zip(starts, counts, strict=True) if size]
        for first, size in sorted(held):
            if first != end:
                ranges = ", ".join(f"{a} to {a + b - 1}" for a, b in held)
                raise ValueError(
                    f"vocab_start: got ids {ranges} on the ranks, expected every id from 0 on once"
                )
            end += size
        if end == 0:
            raise ValueError("weight: got no row on any rank, expected [V, d] with V above 0")
        return Shard(call, starts[call.ranks.rank], count, end)

    def open(self, rows: int, need_entropy: bool, device: torch.device) -> None:
        """Say how many rows a chunk has at most."""
        self.call.open(rows, COLUMNS if need_entropy else COLUMNS - 1, device)

    def gather(self, own: Tensor) -> Tensor:
        """Return what all ranks tell; of this rank, with its graph."""
        every = self.call.gather(own.detach())
        gathered: Tensor = _OfThisRank.apply(own, every, self.call.ranks.rank)
        return gathered


def nothing(rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return what the operator `token_log_probs` would find in rows without columns."""
    zeros = torch.zeros(rows, dtype=dtype, device=device)
    lowest = torch.full((rows,), -math.inf, dtype=torch.float64, device=device)
    return zeros, zeros, lowest, lowest


def of_all(
    shard: Shard,
    found: tuple[Tensor, ...],
    is_away: Tensor,
    temperature: float | Tensor,
    need_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the operator `token_log_probs` finds of all columns: one collective.

    Of those of this rank it `found` as much; `is_away` says whose token is on another rank.
    """
    log_probs, entropy, top, log_sum = found
    own = told_of_rows(top, log_sum, log_probs, entropy if need_entropy else None, is_away)
    if need_entropy:
        every = shard.call.gather(own)
    else:
        every = torch.nn.functional.pad(shard.call.gather(own[:, : COLUMNS - 1]), (0, 1))
    log_prob, entropies, top, log_sum = combined(every, temperature)
    dtype = log_probs.dtype
    return log_prob.to(dtype), entropies.to(dtype) if need_entropy else entropy[:0], top, log_sum


class HiddenRows:
    """Rows of the gradient of hidden states, to which every rank adds what its columns give.

    They are added up in fp32 or wider, all at once.
    """

    def __init__(self, ranks: Ranks, most: int, like: Tensor) -> None:
        """Make room for up to `most` rows of the hidden states `like`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        self._ranks, self._index = ranks, [torch.empty(0, dtype=torch.int64, device=like.device)]
        self._rows = torch.empty((most, like.shape[1]), dtype=dtype, device=like.device)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, product: Tensor, index: Tensor) -> None:
        """Take in the rows of the positions `index`, which come once."""
        end = self._count + len(index)
        self._rows[self._count : end] = product
        self._index.append(index)
        self._count = end

    def finish(self, into: Tensor) -> None:
        """Write the sums over the ranks into `into`: one collective, if there is a row."""
        if self._count:
            rows = self._ranks.add_up(self._rows[: self._count])
            into.index_copy_(0, torch.cat(self._index), rows.to(into.dtype))


def on_every_rank(hidden: Tensor, call: Call) -> Tensor:
    """Return hidden states whose gradient is the sum of those of the ranks."""
    copied: Tensor = _OnEveryRank.apply(hidden, call)
    return copied


# The name in errors of the reference, whose backward is made of these two.
_NAME = "tp_group"


class _OnEveryRank(torch.autograd.Function):
    """Hidden states as they are; their gradient is the sum of those of the ranks.

    Backward speaks to them twice: that all came here, and the sum.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, call: Call) -> Tensor:
        ctx.call = call
        keep_inputs(ctx, hidden)
        return hidden.view_as(hidden)

    @staticmethod
    @first_only(_NAME, kept_inputs)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        before: Call = ctx.call
        with Call(f"{before.function} (backward)", before.name, before.ranks) as call:
            total = grad.clone(memory_format=torch.contiguous_format)
            call.agree({"shape of hidden": tuple(grad.shape), "dtype": grad.dtype})
            before.ranks.add_up(total)
        return total, None


class _OfThisRank(torch.autograd.Function):
    """What all ranks tell, of which this one made a part."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, every: Tensor, rank: int) -> Tensor:
        ctx.rank = rank
        keep_inputs(ctx, own)
        return every.clone()

    @staticmethod
    @first_only(_NAME, kept_inputs)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.rank], None, None


def local_hidden(name: str, hidden: Any, ranks: Ranks) -> Any:
    """Return hidden states as this rank has them; those that are no DTensor are returned.

    Raises:
        ValueError: a DTensor is not whole on every rank.
    """
    if not hasattr(hidden, "full_tensor"):
        return hidden
    check_mesh(name, hidden.device_mesh, ranks)
    if not all(placement.is_replicate() for placement in hidden.placements):
        raise ValueError(
            f"{name}: got a DTensor placed as {hidden.placements}, expected all of it on every "
            "rank, Replicate()"
        )
    # Each rank is handed the gradient of the whole.
    return hidden.to_local(grad_placements=hidden.placements)


def local_rows(name: str, value: Any, ranks: Ranks) -> tuple[Any, int | None]:
    """Return this rank's rows of a weight or bias, and the first of them if that is known.

    Raises:
        ValueError: a DTensor is not split by its rows over the ranks.
    """
    if not hasattr(value, "full_tensor"):
        return value, None
    check_mesh(name, value.device_mesh, ranks)
    (placement,) = value.placements
    if not placement.is_shard(0):
        raise ValueError(
            f"{name}: got a DTensor placed as {value.placements}, expected Shard(0): rows of the "
            "vocabulary"
        )
    return value.to_local(grad_placements=value.placements), first_row(len(value), ranks)


def first_row(vocabulary: int, ranks: Ranks) -> int:
    """Return where this rank's rows begin, as torch places them by ``Shard(0)``.

    All ranks have equally many, but for the last ones, which may have fewer or none.
    """
    return min(ranks.rank * -(-vocabulary // ranks.size), vocabulary)


def check_mesh(name: str, mesh: Any, ranks: Ranks) -> None:
    """Raise unless the ranks of a DTensor's mesh are those of the group, in the same order."""
    own, wanted = mesh.mesh.flatten().tolist(), dist.get_process_group_ranks(ranks.group)
    if mesh.ndim != 1 or own != wanted:
        raise ValueError(
            f"{name}: got a DTensor over ranks {own} in {mesh.ndim} dimensions, expected those of "
            f"tp_group in one, {wanted}"
        )
