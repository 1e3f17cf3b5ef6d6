"""Operations on logits after the output head, watched while the forward of a model goes on.

Values of a few rows cannot show what is done to other positions alone. Operations can: a scale and
a softcap are made of few, which treat all elements alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .tensor_parallel import local

# They treat all elements of a tensor alike, if their other arguments are single numbers.
_ALIKE = {"mul", "mul_", "div", "div_", "tanh", "tanh_", "_to_copy", "clone", "detach"}


class Watch(TorchDispatchMode):
    """What becomes of one tensor, until `stop`."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        # Storages by address, which stay while they are here; and what was done to them, if it is
        # not known to treat all elements alike.
        self._seen: dict[int, tuple[torch.UntypedStorage, str | None]] = {}
        self._note(logits, None)
        self._runs = self._sees = False

    def start(self) -> None:
        """Watch from here on."""
        self.__enter__()
        self._runs = True

    def stop(self) -> None:
        """Watch no longer; without a start, and a second time, it does nothing."""
        if self._runs:
            self._runs = self._sees = False
            # Code that torch.compile made around the start puts modes to sleep when it ends.
            torch.empty(0, dtype=torch.float32, device="cpu")
            self.__exit__(None, None, None)

    def why_unknown(self, made: Tensor) -> str | None:
        """Return which operation made `made` that is not known to treat all elements alike.

        None where all are, and where nothing was seen.
        """
        if not self._sees:
            return None
        _, reason = self._seen.get(_address(made), (None, "an operation that torch does not show"))
        return reason

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._sees = True
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        made = func(*args, **kwargs)
        given = [value for value in inputs if _address(value) in self._seen]
        if not given:
            return made
        # A view of a DTensor may have memory of its own.
        is_alike = func.__name__.partition(".")[0] in _ALIKE or _is_view(func)
        # Beside the logits, single numbers.
        is_alike &= sum(value.numel() != 1 for value in inputs) == 1
        reasons = [reason for value in given if (reason := self.why_unknown(value))]
        reason = reasons[0] if reasons else None if is_alike else str(func)
        for value in _tensors(made):
            # A view shares what it is a view of, until something is written. Of logits whose ids
            # are all on other ranks there is nothing.
            if _address(value) not in self._seen:
                self._note(value, reason if value.numel() else None)
        for value in map(local, _written(func, args, kwargs)):
            is_part = value.numel() * value.itemsize != value.untyped_storage().nbytes()
            self._note(value, f"{func} on a part" if is_part and reason is None else reason)
        return made

    def _note(self, value: Tensor, reason: str | None) -> None:
        if address := _address(value):
            self._seen[address] = local(value).untyped_storage(), reason


def _address(value: Tensor) -> int:
    """Return the address of the storage of a tensor; 0 if it has none, as a sparse one.

    Of a DTensor, it is that of what this rank has.
    """
    try:
        return int(local(value).untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0


def _is_view(func: Any) -> bool:
    """Return whether an operation returns a view of an argument."""
    schema = getattr(func, "_schema", None)
    aliases = [] if schema is None else [returned.alias_info for returned in schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that an operation writes to."""
    schema = getattr(func, "_schema", None)
    arguments = [] if schema is None else schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)}
    given.update(kwargs)
    return [
        tensor
        for argument in arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(given.get(argument.name))
    ]


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in arguments or in what an operation returns."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for part in value for tensor in _tensors(part)]
