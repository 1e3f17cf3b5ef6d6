"""Which tokens each rank of a context-parallel group holds, and the way to the whole and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, overload

import torch
from torch import Tensor

from .. import checks
from ..backends.derivatives import first_only, keep_inputs, kept_inputs
from ..backends.untraced import untraced
from ..layout import integers
from ..ranks import Call, Ranks
from . import columns as columns_of
from .blocks import Blocks


class ContextShard:
    """The tokens of a batch that this rank of a context-parallel group holds.

    Attention over long rows splits the token dimension of a batch over ranks, so that the tokens of
    one step lie on several of them. Its ratio, and whether it is clipped, depend on all of them.
    `whole` brings the log-probs of all ranks together, and from there on every function of the
    package is called with the whole batch on every rank: all of them compute the same numbers from
    the same bits. That is 4 bytes for each fp32 log-prob, next to the d numbers per token and layer
    that attention exchanges itself.

    Objectives from hidden states have `context_linear_steppo_loss`, and values go through `whole`
    like log-probs: before `step_gae`, `step_value_loss` or `rollout_weights`.

    The loss on each rank is that of the whole batch, and its gradient by parameters is that through
    the tokens of the rank. The gradients of the ranks of the group are therefore to be **summed**.
    What averages them (DDP, FSDP over a mesh with this group in it) wants the normalizer divided by
    `size`.

    Position i of hidden states predicts token i + 1, which may lie on another rank: token ids (and
    the mask of the layout) are shifted before `local` is taken of them.

    Attributes:
        columns: int64 ``[T_r]``, the places of the tokens of this rank in the token dimension, in
            the order in which it holds them.
        length: T, the length of the token dimension.
        dim: the token dimension: 1 of ``[B, T, ...]``, 0 of packed ``[N, ...]``.
        ranks: the group, the place of this rank in it, and how many it has.
        rank, size: those two numbers.

    Example:
        >>> import torch.distributed as dist
        >>> from steppo_kernels.distributed import ContextShard
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 1, 1, 1]])
        >>> taken, layout = ids[:, 1:], StepLayout.from_mask(mask[:, 1:])  # shifted as a whole
        >>> shard = ContextShard.zigzag(3)
        >>> own = shard.local(taken)  # of these, this rank has hidden states
        >>> log_probs = (-0.1 * own).requires_grad_()  # and computes log-probs
        >>> old, advantages = torch.full((1, 3), -0.7), torch.tensor([2.0])
        >>> steppo_loss(shard.whole(log_probs), old, advantages, layout).loss.backward()
        >>> log_probs.grad
        tensor([[-0.6667, -0.6667, -0.6667]])
        >>> dist.destroy_process_group()
    """

    def __init__(self, *args: Any, **fields: Any) -> NoReturn:
        raise TypeError(
            "ContextShard: got a call, expected one of its constructors: ContextShard.contiguous, "
            "zigzag or of_columns"
        )

    @classmethod
    def contiguous(cls, length: int, *, dim: int = 1, group: Any = None) -> ContextShard:
        """Give rank r the r-th of R chunks, as ``torch.chunk`` makes them.

        All but the last have ``ceil(T / R)`` tokens; the last ranks may have fewer, or none. All
        ranks call it. It speaks to the other ranks once, in a gather of 168 bytes a rank.

        Args:
            length: T, at least 0; the same on all ranks.
            dim: the token dimension, 0 or 1.
            group: the context-parallel group, a ProcessGroup or a DeviceMesh of one dimension; None
                is all ranks.

        Raises:
            ValueError, TypeError: naming the argument; or ranks got different arguments.
            RuntimeError: another rank raised an error, or there is no process group.

        Example:
            >>> import torch.distributed as dist
            >>> from steppo_kernels.distributed import ContextShard
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            >>> ContextShard.contiguous(4).columns
            tensor([0, 1, 2, 3])
            >>> dist.destroy_process_group()
        """
        return cls._of_chunks(columns_of.contiguous, length, None, dim, group)

    @classmethod
    def zigzag(
        cls,
        length: int,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        dim: int = 1,
        group: Any = None,
    ) -> ContextShard:
        """Give rank r the chunks r and 2R - 1 - r of 2R, which balances causal attention.

        ``torch.distributed.tensor.experimental.context_parallel`` splits so, and ring attention.
        Chunks have ``ceil(T / 2R)`` tokens, and the last of them may be shorter or empty. All ranks
        call it. It speaks to the other ranks once, in a gather of 168 bytes a rank.

        Args:
            length: T, at least 0; the same on all ranks.
            cu_seqlens: int ``[rows + 1]``, where packed rows begin in the token dimension: each row
                is split in this way by itself, and a rank holds its two chunks of the first row,
                then those of the second one. None: the token dimension is split as a whole.
            dim: the token dimension, 0 or 1.
            group: as in `contiguous`.

        Raises:
            ValueError, TypeError, RuntimeError: as `contiguous`.

        Example:
            >>> import torch.distributed as dist
            >>> from steppo_kernels.distributed import ContextShard
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            >>> ContextShard.zigzag(6, cu_seqlens=[0, 4, 6], dim=0)
            ContextShard(6 of 6 tokens of dimension 0 on rank 0 of 1)
            >>> dist.destroy_process_group()
        """
        return cls._of_chunks(columns_of.zigzag, length, cu_seqlens, dim, group)

    @classmethod
    @untraced
    def of_columns(
        cls,
        columns: Tensor | Sequence[int],
        length: int,
        *,
        dim: int = 1,
        group: Any = None,
    ) -> ContextShard:
        """Make a shard of any places; each place is that of one token of one rank.

        All ranks call it. It speaks to the other ranks twice: in a gather of 168 bytes a rank, and
        in one of 8 bytes for each token of the rank that has the most. A shard can be used for as
        many batches as are split in the same way.

        Args:
            columns: int ``[T_r]``, the places of the tokens of this rank in the token dimension, in
                the order in which it holds them; may be empty.
            length: T, at least 0; the same on all ranks.
            dim: the token dimension, 0 or 1.
            group: as in `contiguous`.

        Raises:
            ValueError, TypeError: naming the argument; or ranks got different arguments; or a place
                is that of no token, or of two: on all ranks.
            RuntimeError: as `contiguous`.

        Example:
            >>> import torch.distributed as dist
            >>> from steppo_kernels.distributed import ContextShard
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            >>> shard = ContextShard.of_columns([2, 0, 1], 3)
            >>> shard.local(torch.tensor([[5, 6, 7]]))
            tensor([[7, 5, 6]])
            >>> shard.whole(torch.tensor([[7, 5, 6]]))
            tensor([[5, 6, 7]])
            >>> dist.destroy_process_group()
        """
        ranks = Ranks.of("group", group)
        with Call("ContextShard.of_columns", "group", ranks) as call:
            own = integers.vector("columns", columns)
            own = checks.dims("columns", own, (1,)).to("cpu", torch.int64)
            length, dim = checks.count("length", length, 0), columns_of.check_dim(dim)
            if len(own) and not 0 <= int(own.min()) <= int(own.max()) < length:
                bad = own[(own < 0) | (own >= length)][0].item()
                raise ValueError(f"columns: got {bad}, expected places of a length of {length}")
            device = ranks.words_device()
            said = call.agree({"length": length, "dim": dim}, (len(own),))
            lengths = [count for (count,) in said]
            call.open(max(lengths), 1, device)
            padded = torch.zeros((max(lengths), 1), dtype=torch.float64, device="cpu")
            padded[: len(own), 0] = own.to(torch.float64)
            heard = call.gather(padded, last=True)[..., 0].to("cpu", torch.int64)
        every = [row[:count] for row, count in zip(heard, lengths, strict=True)]
        columns_of.check_cover(every, length)
        return _made(ranks, every, length, dim)

    @classmethod
    @untraced
    def _of_chunks(
        cls,
        split: Callable[[Sequence[tuple[int, int]], int], list[Tensor]],
        length: int,
        cu_seqlens: Tensor | Sequence[int] | None,
        dim: int,
        group: Any,
    ) -> ContextShard:
        ranks = Ranks.of("group", group)
        with Call(f"ContextShard.{split.__name__}", "group", ranks) as call:
            length, dim = checks.count("length", length, 0), columns_of.check_dim(dim)
            every = split(columns_of.rows_of(length, cu_seqlens), ranks.size)
            shard = _made(ranks, every, length, dim)
            call.agree(shard_facts(shard))
        return shard

    # What follows is set by `_made`.
    columns: Tensor
    length: int
    dim: int
    ranks: Ranks
    _blocks: Blocks
    _index: dict[torch.device, Tensor]

    @property
    def rank(self) -> int:
        """The place of this rank in the group."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """The number of ranks of the group."""
        return self.ranks.size

    def __repr__(self) -> str:
        return (
            f"ContextShard({len(self.columns)} of {self.length} tokens of dimension {self.dim} "
            f"on rank {self.rank} of {self.size})"
        )

    def local_shape(self, shape: torch.Size) -> torch.Size:
        """Return the token shape of this rank, ``[B, T_r]`` or ``[N_r]``, of that of the whole.

        Raises:
            ValueError: the token dimension has another length, or there is none.

        Example:
            >>> import torch.distributed as dist
            >>> from steppo_kernels.distributed import ContextShard
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            >>> ContextShard.contiguous(4).local_shape(torch.Size([2, 4]))
            torch.Size([2, 4])
            >>> dist.destroy_process_group()
        """
        if len(shape) != self.dim + 1 or shape[self.dim] != self.length:
            wanted = f"[B, {self.length}]" if self.dim else f"[{self.length}]"
            raise ValueError(
                f"layout: got the token shape {list(shape)}, expected {wanted} of the shard"
            )
        return torch.Size((*shape[: self.dim], len(self.columns)))

    @overload
    def local(self, part: Tensor, /) -> Tensor: ...
    @overload
    def local(self, part: Tensor, second: Tensor, /, *more: Tensor) -> tuple[Tensor, ...]: ...
    def local(self, *parts: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the tokens of this rank of tensors of the whole batch.

        It does not speak to the other ranks.

        Args:
            *parts: ``[B, T, ...]`` (``[N, ...]`` with ``dim=0``) of any dtype.

        Returns:
            ``[B, T_r, ...]`` of one tensor, or a tuple of several. Gradients flow back.

        Raises:
            ValueError, TypeError: naming the argument.

        Example:
            >>> import torch.distributed as dist
            >>> from steppo_kernels.distributed import ContextShard
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            >>> shard = ContextShard.zigzag(2, dim=0)
            >>> shard.local(torch.tensor([3, 4]), torch.ones(2, 3))[1].shape
            torch.Size([2, 3])
            >>> dist.destroy_process_group()
        """
        found = tuple(
            checked.index_select(self.dim, self._index_on(checked.device))
            for checked in self._checked(parts, self.length)
        )
        return found[0] if len(found) == 1 else found

    @overload
    def whole(self, part: Tensor, /) -> Tensor: ...
    @overload
    def whole(self, part: Tensor, second: Tensor, /, *more: Tensor) -> tuple[Tensor, ...]: ...
    @untraced
    def whole(self, *parts: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return tensors of the whole batch, of those of the tokens of each rank.

        All ranks call it. It speaks to the other ranks twice, however many tensors there are: in a
        gather of 168 bytes a rank, in which they agree on shapes and dtypes, and in one of the
        bytes of the tensors of the rank that has the most tokens. Backward does not speak to them:
        the gradient of the tokens of this rank is taken out of that of the whole. That is right if
        all ranks compute the same from what is returned, and sum the gradients of parameters.

        Args:
            *parts: ``[B, T_r, ...]`` (``[N_r, ...]`` with ``dim=0``) of any dtype; they differ over
                the ranks in T_r alone. T_r and B may be 0.

        Returns:
            ``[B, T, ...]`` of one tensor, or a tuple of several: the same bits on all ranks.

        Raises:
            ValueError, TypeError: naming the argument; or ranks got different arguments.
            RuntimeError: another rank raised an error; or in backward, for second derivatives.

        Example:
            >>> import torch.distributed as dist
            >>> from steppo_kernels.distributed import ContextShard
            >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            >>> shard = ContextShard.contiguous(2)
            >>> log_probs, values = shard.whole(torch.zeros(3, 2), torch.ones(3, 2))
            >>> values.sum()
            tensor(6.)
            >>> dist.destroy_process_group()
        """
        with Call("ContextShard.whole", "group", self.ranks) as call:
            given = self._checked(parts, len(self.columns))
            for place, part in enumerate(given):
                if part.is_conj():
                    raise ValueError(
                        f"parts[{place}]: got the conjugate view of a complex tensor, expected one "
                        "whose memory holds its values: resolve_conj() of it"
                    )
            facts = {
                f"parts[{place}]": (part.dtype, *_others(part.shape, self.dim), part.device.type)
                for place, part in enumerate(given)
            }
            size = word_of(self, given)
            call.agree({**shard_facts(self), **facts})
            call.open(*size, given[0].device)
            found = put_together(self, call, given)
        return found[0] if len(found) == 1 else found

    def _moved(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors with the token dimension in front."""
        return [part.movedim(self.dim, 0) for part in parts]

    def _index_on(self, device: torch.device) -> Tensor:
        if device not in self._index:
            self._index[device] = self.columns.to(device)
        return self._index[device]

    def _checked(self, parts: Sequence[object], length: int) -> list[Tensor]:
        if not parts:
            raise TypeError("parts: got none, expected at least one torch.Tensor")
        found: list[Tensor] = []
        for place, part in enumerate(parts):
            name = f"parts[{place}]"
            checked = checks.tensor(name, part)
            if checked.dim() <= self.dim or checked.shape[self.dim] != length:
                raise ValueError(
                    f"{name}: got shape {tuple(checked.shape)}, expected {length} tokens in "
                    f"dimension {self.dim}"
                )
            found.append(checks.on_device(name, checked, found[0].device) if found else checked)
        return found


def shard_facts(shard: ContextShard) -> dict[str, object]:
    """Return what the ranks must know alike of a shard."""
    return {"length": shard.length, "dim": shard.dim, "order of columns": shard._blocks.mark}


def word_of(shard: ContextShard, parts: Sequence[Tensor]) -> tuple[int, int]:
    """Return the rows and columns of the word of `put_together`, which is the last of its call.

    Only dtypes and shapes of the parts are read.
    """
    return shard._blocks.word(shard._moved(parts))


def put_together(shard: ContextShard, call: Call, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the parts of all ranks as those of the whole: one collective."""
    found: tuple[Tensor, ...] = _Whole.apply(shard, call, *parts)
    return found


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: ContextShard, call: Call, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.shard = shard
        keep_inputs(ctx, *parts)
        dim = shard.dim
        wholes = shard._blocks.gather(call, shard._moved(parts))
        found = tuple(one.movedim(0, dim).contiguous() for one in wholes)
        ctx.mark_non_differentiable(
            *[one for one in found if not (one.is_floating_point() or one.is_complex())]
        )
        return found

    @staticmethod
    @first_only("ContextShard.whole", kept_inputs)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        shard = ctx.shard
        needed = ctx.needs_input_grad[2:]
        return (
            None,
            None,
            *(
                grad.index_select(shard.dim, shard._index_on(grad.device))
                if need and grad is not None
                else None
                for need, grad in zip(needed, grads, strict=True)
            ),
        )


def _made(ranks: Ranks, every: Sequence[Tensor], length: int, dim: int) -> ContextShard:
    """Return the shard of a rank; `every` has the places of each."""
    shard: Any = object.__new__(ContextShard)  # type: ignore[arg-type]
    shard.columns, shard.length, shard.dim = every[ranks.rank], length, dim
    shard.ranks, shard._blocks, shard._index = ranks, Blocks(every, length), {}
    made: ContextShard = shard
    return made


def _others(shape: torch.Size, dim: int) -> tuple[object, ...]:
    """Return a shape with a name in the place of the tokens, of which ranks have different ones."""
    return (*shape[:dim], "T", *shape[dim + 1 :])
