"""The memory that backward may overwrite with a gradient, where logits are rows of another tensor.

A causal LM's ``logits[:, :-1]`` is a slice: left to autograd, its gradient would be copied into a
second tensor of the size of all logits. The gradient of the whole is therefore written in place,
around the slice as well.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# What autograd calls the operations that only look at memory in another way.
_VIEWS = {
    f"{name}Backward0"
    for name in ("Alias", "Permute", "Select", "Slice", "Squeeze", "Transpose", "Unsqueeze", "View")
} | {"SqueezeBackward1"}


class Whole(NamedTuple):
    """A tensor and the logits in it.

    Attributes:
        tensor: what the gradient is of: logits themselves, or what they are a slice of.
        part: None if they are the tensor; else shape, strides and offset of the logits in it, and
            the rows of it (int64) that are none of theirs.
    """

    tensor: Tensor
    part: tuple[torch.Size, tuple[int, ...], int, Tensor] | None

    @classmethod
    def of(cls, logits: Tensor) -> Whole:
        """Return the tensor whose rows `logits` are, if autograd sees nothing between them."""
        if torch.compiler.is_compiling():
            return cls(logits, None)
        base = logits._base
        if base is None or not _is_view_of(logits, base) or not _are_rows(logits, base):
            return cls(logits, None)
        vocabulary = logits.shape[-1]
        offset = int(logits.storage_offset() - base.storage_offset())
        is_rest = torch.ones(base.numel() // vocabulary, dtype=torch.uint8, device=logits.device)
        strides = [stride // vocabulary for stride in logits.stride()[:-1]]
        is_rest.as_strided(logits.shape[:-1], strides, offset // vocabulary).fill_(0)
        # Their number is known: nothing waits for the device.
        count = len(is_rest) - logits.shape[:-1].numel()
        rest = is_rest.argsort(descending=True)[:count]
        return cls(base, (logits.shape, logits.stride(), offset, rest))

    def logits_in(self, tensor: Tensor) -> Tensor:
        """Return the logits in `tensor`, an alias of `self.tensor` or a copy."""
        if self.part is None:
            return tensor
        shape, strides, offset, _ = self.part
        return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)

    def clear_rest(self, tensor: Tensor) -> None:
        """Zero the rows of `tensor` that did not lead to the logits."""
        if self.part is not None:
            shape, _, _, rest = self.part
            tensor.view(-1, shape[-1]).index_fill_(0, rest, 0.0)


def _is_view_of(logits: Tensor, base: Tensor) -> bool:
    """Whether the gradient of `logits` goes to that of `base` alone, and nobody looks at it."""
    if not base.requires_grad or logits.retains_grad or logits._backward_hooks:
        return False
    node = logits.grad_fn
    while node is not None and node is not base.grad_fn:
        if node.name() not in _VIEWS:
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
