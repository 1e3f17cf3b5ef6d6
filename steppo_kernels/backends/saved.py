"""What a forward pass leaves for its backward, and how backward knows that it is unchanged.

Autograd compares the versions of saved tensors, but not where saved-tensor hooks stand between
(activation offloading), and not those of tensors that a function holds in another way. Here every
saved tensor that comes back in the memory it was saved in must have the version it was saved with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# The saved-tensor hooks that are on; a torch without the answer says that there are some.
_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


def hand_over(ctx: Any, *tensors: Tensor | None) -> None:
    """Save what forward has made for backward."""
    ctx.save_for_backward(*tensors)
    is_watched = not torch.compiler.is_compiling() and _hooks(False) is not None
    ctx.kinds = [value is not None and _Kind.of(value) for value in tensors] if is_watched else ()


def handed_back(ctx: Any) -> tuple[Tensor | None, ...]:
    """Return what `hand_over` was given.

    Raises:
        RuntimeError: saved-tensor hooks return a tensor of another kind.
    """
    found: tuple[Tensor | None, ...] = ctx.saved_tensors
    for kind, value in zip(ctx.kinds, found, strict=False):
        if kind and value is not None:
            kind.check("a saved gradient", value)
    return found


def save(ctx: Any, given_temperature: Tensor | None, **tensors: Tensor | None) -> None:
    """Save tensors for backward, by the names that an error about them is to have.

    The caller's temperature may be another tensor than the converted one among them.
    """
    ctx.save_for_backward(*tensors.values())
    ctx.versions, ctx.temperature = {}, None
    if torch.compiler.is_compiling():
        return
    if _hooks(False) is not None:
        ctx.versions = {
            name: None if value is None or value.is_inference() else _Version(value)
            for name, value in tensors.items()
        }
    if given_temperature is not None and not given_temperature.is_inference():
        ctx.temperature = given_temperature.detach(), given_temperature._version


def saved(ctx: Any) -> tuple[Tensor | None, ...]:
    """Return the tensors that `save` was given.

    Raises:
        RuntimeError: a saved tensor or the temperature was changed in place since.
    """
    found: tuple[Tensor | None, ...] = ctx.saved_tensors
    if torch.compiler.is_compiling():
        return found
    for (name, version), value in zip(ctx.versions.items(), found, strict=False):
        if version is not None and value is not None:
            version.check(name, value)
    if ctx.temperature is not None:
        _compare("temperature", *ctx.temperature)
    return found


class _Kind(NamedTuple):
    """What kernels rely on of a tensor that comes back."""

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size

    @classmethod
    def of(cls, value: Tensor) -> _Kind:
        """Return the kind of a tensor."""
        return cls(value.dtype, value.device, value.shape)

    def check(self, name: str, value: Tensor) -> None:
        """Raise if `value` is of another kind."""
        if (found := _Kind.of(value)) != self:
            raise RuntimeError(
                f"{name}: saved-tensor hooks return {found.dtype} {tuple(found.shape)} on "
                f"{found.device}, expected {self.dtype} {tuple(self.shape)} on {self.device}, as "
                "was saved"
            )


class _Version:
    """The memory, the version and the kind of a tensor, without keeping it alive."""

    def __init__(self, value: Tensor) -> None:
        self._storage, self._number = StorageWeakRef(value.untyped_storage()), value._version
        self._kind = _Kind.of(value)

    def check(self, name: str, value: Tensor) -> None:
        """Raise if `value` lies in that memory at another version; a copy of it may be at any."""
        self._kind.check(name, value)
        if value.untyped_storage()._cdata == self._storage.cdata:
            _compare(name, value, self._number)


def _compare(name: str, value: Tensor, version: int) -> None:
    if value._version != version:
        raise RuntimeError(
            f"{name}: got a tensor that was modified by an inplace operation between forward and "
            f"backward (at version {value._version}, expected {version}); change a copy of it"
        )
