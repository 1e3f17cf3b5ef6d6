"""The most memory of new tensors that a block holds at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steppo_kernels.memory import release


class Peak(TorchDispatchMode):
    """Follows the memory that operations of torch return, and that none of them was given.

    Attributes:
        bytes: the most that was alive after an operation.
        held: what was alive then, as bytes with the shape of the tensor, the largest first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.held: list[tuple[int, tuple[int, ...]]] = []
        self._alive: dict[int, tuple[StorageWeakRef, int, tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_address(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for place in [place for place, (ref, *_) in self._alive.items() if ref.expired()]:
            del self._alive[place]
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and (place := _address(one)) not in given:
                storage = one.untyped_storage()
                ref = StorageWeakRef(storage)
                self._alive[place] = ref, storage.nbytes(), tuple(one.shape)
        now = sum(size for _, size, _ in self._alive.values())
        if now > self.bytes:
            self.bytes = now
            self.held = sorted(((n, shape) for _, n, shape in self._alive.values()), reverse=True)
        return result


def _address(value: Tensor) -> int:
    return value.untyped_storage()._cdata


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure a block, without what earlier calls have kept to be used again."""
    release()
    with Peak() as mode:
        yield mode
