"""The memory that backward may overwrite with a gradient, where logits are rows of another tensor.

A causal LM's ``logits[:, :-1]`` is a slice: left to autograd, its gradient would be copied into a
second tensor of the size of all logits. The gradient of the whole is therefore written in place,
around the slice as well.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What autograd calls the operations that only look at memory in another way.
_VIEWS = {
    f"{name}Backward0"
    for name in ("Alias", "Permute", "Select", "Slice", "Squeeze", "Transpose", "Unsqueeze", "View")
} | {"SqueezeBackward1"}
# What it calls the node of a leaf, which adds to the leaf's `grad`.
_LEAF = "torch::autograd::AccumulateGrad"

# Shape, strides and offset of rows in a contiguous tensor, counted in rows. The last dimension is
# dense.
Rows = tuple[tuple[int, ...], tuple[int, ...], int]


class Part(NamedTuple):
    """Logits that are rows of another tensor, which is contiguous.

    Attributes:
        shape, strides, offset: those of the logits in that tensor.
        rest: the rows of it that are none of theirs.
        given: the logits, for as long as the caller has them.
    """

    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    rest: list[Rows]
    given: weakref.ref[Tensor]

    def of(self, whole: Tensor) -> Tensor:
        """Return the logits in the tensor that they are rows of, an alias of it or a copy."""
        offset = whole.storage_offset() + self.offset
        return whole.as_strided(self.shape, self.strides, offset)

    def clear_rest(self, whole: Tensor) -> None:
        """Zero the rows that did not lead to the logits."""
        vocabulary, start = self.shape[-1], whole.storage_offset()
        for sizes, strides, offset in self.rest:
            whole.as_strided(
                (*sizes[:-1], sizes[-1] * vocabulary),
                (*(stride * vocabulary for stride in strides[:-1]), 1),
                start + offset * vocabulary,
            ).zero_()

    def is_passed_by(self, ctx: Any) -> bool:
        """Return whether the running backward may go around the logits, straight to the whole.

        Not if somebody looks at their gradient by now, or wants no other. `ctx` is the node whose
        first input is the whole.
        """
        logits = self.given()
        if logits is not None and _is_looked_at(logits):
            return False
        try:
            return bool(torch._C._will_engine_execute_node(ctx.next_functions[0][0]))
        except RuntimeError:
            # torch does not answer for a leaf that `torch.autograd.grad` was asked for.
            return True


def whole_of(logits: Tensor) -> tuple[Tensor, Part | None]:
    """Return the tensor whose rows `logits` are, if autograd sees nothing between them.

    That may be `logits` themselves: then there is no part.
    """
    if torch.compiler.is_compiling():
        return logits, None
    base = logits._base
    if base is None or not _is_view_of(logits, base) or not _are_rows(logits, base):
        return logits, None
    vocabulary = logits.shape[-1]
    offset = int(logits.storage_offset() - base.storage_offset())
    rest = other_rows(
        logits.shape[:-1],
        tuple(stride // vocabulary for stride in logits.stride()[:-1]),
        offset // vocabulary,
        base.numel() // vocabulary,
    )
    return base, Part(logits.shape, logits.stride(), offset, rest, weakref.ref(logits))


def other_rows(
    sizes: tuple[int, ...], strides: tuple[int, ...], offset: int, count: int
) -> list[Rows]:
    """Return which of `count` rows are not those of given sizes, strides and offset.

    These must nest: what the dimensions of smaller strides span fits into each stride.
    """
    if 0 in sizes:
        return [((count,), (1,), 0)]
    outer, outer_strides, span = _merged(sizes, strides)
    found: list[Rows] = []
    for depth, stride in reversed(list(enumerate(outer_strides))):
        # Two neighbours in this dimension have a gap between them.
        steps, gap = outer[depth], stride - span
        if gap:
            found.append(((*outer[:depth], steps - 1, gap), (*outer_strides[: depth + 1], 1), span))
        span += (steps - 1) * stride
    before, after = offset, count - offset - span
    found = [(shape, step, offset + start) for shape, step, start in found]
    if found:
        # Before the first and after the last of the outermost dimension may lie one more gap each.
        (steps, *inner), step, start = found[-1]
        if len(inner) == 1:
            if before == inner[0]:
                steps, start, before = steps + 1, start - step[0], 0
            if after == inner[0]:
                steps, after = steps + 1, 0
            found[-1] = (steps, *inner), step, start
    if before:
        found.append(((before,), (1,), 0))
    if after:
        found.append(((after,), (1,), count - after))
    return found


def _merged(
    sizes: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return sizes and descending strides of the fewest dimensions, and the rows of a dense end."""
    merged: list[tuple[int, int]] = []
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size == 1:
            continue
        inner, inner_stride = merged[-1] if merged else (1, 1)
        if stride == inner * inner_stride:
            merged[-1:] = [(inner * size, inner_stride)]
        else:
            merged.append((size, stride))
    dense = merged.pop(0)[0] if merged and merged[0][1] == 1 else 1
    merged.reverse()
    return tuple(size for size, _ in merged), tuple(stride for _, stride in merged), dense


def _is_looked_at(logits: Tensor) -> bool:
    return bool(logits.retains_grad or logits._backward_hooks)


def _is_view_of(logits: Tensor, base: Tensor) -> bool:
    """Whether the gradient of `logits` goes to that of `base` alone, and nobody looks at it."""
    if not base.requires_grad or _is_looked_at(logits):
        return False
    node: Any = logits.grad_fn
    while node is not None and node is not base.grad_fn:
        name = node.name()
        if name == _LEAF:
            return node.variable is base
        if name not in _VIEWS:
            return False
        node = node.next_functions[0][0]
    return node is not None


def _are_rows(logits: Tensor, base: Tensor) -> bool:
    vocabulary = logits.shape[-1]
    return (
        base.is_contiguous()
        and base.shape[-1:] == (vocabulary,)
        and logits.stride(-1) == 1
        and all(stride % vocabulary == 0 for stride in logits.stride()[:-1])
        and (logits.storage_offset() - base.storage_offset()) % vocabulary == 0
    )
