"""The output head of a model: whether it is a plain matrix, and a forward that a call can take."""

from __future__ import annotations

import threading
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .tensor_parallel import Part, part_of

_WAY_OUT = (
    "keep the head out of what changed it, or use steppo_loss_from_logits and token_log_probs on "
    "the logits of the model, or linear_steppo_loss on hidden states and any weight, such as "
    "base + B @ A"
)


class AtHead(Protocol):
    """A call of a model that wants the hidden states of its head."""

    head: nn.Linear

    def at_head(self, hidden: Tensor) -> Tensor:
        """Return what the head is to return for `hidden`."""


# A forward neither yields nor awaits, so that no other call of its thread comes in between. That is
# why this may be a variable of the thread: torch.compile follows it, and cannot follow contextvars.
class _OfThread(threading.local):
    """The call with `steppo` that runs in a thread."""

    def __init__(self) -> None:
        # Each thread runs this. For an attribute of the class, torch.compile would take that.
        self.call: AtHead | None = None


_of_thread = _OfThread()


def current() -> AtHead | None:
    """Return the call with `steppo` that runs in this thread."""
    return _of_thread.call


@torch.compiler.disable(recursive=False)
def run_within(call: AtHead | None, forward: Any, args: Any, kwargs: Any) -> Any:
    """Run a forward in which the head belongs to `call`; to none, it is as without a patch."""
    before = _of_thread.call
    _of_thread.call = call
    try:
        return forward(*args, **kwargs)
    finally:
        _of_thread.call = before


def head_forward(self: Any, input: Tensor) -> Tensor:
    """Stand in for the forward of a head, for as long as its model is patched."""
    call = _of_thread.call
    if call is None or call.head is not self:
        output: Tensor = type(self).forward(self, input)
    else:
        output = _in_place_of(call, input)
    return output


@torch.compiler.disable
def _in_place_of(call: AtHead, hidden: Tensor) -> Tensor:
    """Hand `hidden` to the call; compiled code stops here."""
    return call.at_head(hidden)


class _Seat(NamedTuple):
    """Where the forward of a head is: in an attribute of it, or in what stands in its place.

    Attributes:
        name: of the attribute. accelerate moves weights around a forward that it keeps aside.
        cell: where transformers' tensor parallelism keeps the forward that it surrounds, or None.
        mesh: the ranks of that.
    """

    name: str
    cell: CellType | None = None
    mesh: Any = None

    def found(self, head: nn.Module) -> Any:
        """Return the forward, or None where it is that of the class."""
        return head.__dict__.get(self.name) if self.cell is None else self.cell.cell_contents

    def put(self, head: nn.Module, forward: Any) -> None:
        """Put a forward there."""
        if self.cell is None:
            setattr(head, self.name, forward)
        else:
            self.cell.cell_contents = forward


def _seat(head: nn.Module) -> _Seat:
    name = "_old_forward" if "_old_forward" in head.__dict__ else "forward"
    own = head.__dict__.get(name)
    if not isinstance(own, FunctionType) or str(own.__module__).split(".")[0] != "transformers":
        return _Seat(name)
    # What its variables hold says which is which.
    cells = own.__closure__ or ()
    meshes = [cell for cell in cells if hasattr(cell.cell_contents, "mesh_dim_names")]
    forwards = [cell for cell in cells if _is_forward_of(head, cell.cell_contents)]
    if len(meshes) != 1 or len(forwards) != 1:
        return _Seat(name)
    return _Seat(name, forwards[0], meshes[0].cell_contents)


def _is_forward_of(head: nn.Module, value: object) -> bool:
    """Return whether a value is the forward of a head, as it is or while its model is patched."""
    return isinstance(value, MethodType) and value in (
        MethodType(nn.Linear.forward, head),
        MethodType(head_forward, head),
    )


def install(head: nn.Linear) -> None:
    """Put `head_forward` in the place of the forward of `head`."""
    _seat(head).put(head, MethodType(head_forward, head))


def uninstall(head: nn.Linear) -> None:
    """Restore the forward of `head`."""
    seat = _seat(head)
    if not is_installed(head):
        return
    if seat.name == "forward" and seat.cell is None:
        delattr(head, seat.name)
    else:
        seat.put(head, MethodType(type(head).forward, head))


def is_installed(head: nn.Module) -> bool:
    """Return whether the forward of `head` is `head_forward`."""
    return getattr(_seat(head).found(head), "__func__", None) is head_forward


def adopt(head: nn.Module) -> None:
    """Let a copy of a head, which shares the forward of another, have its own."""
    if is_installed(head):
        _seat(head).put(head, MethodType(head_forward, head))


def plain_head(model: Any) -> nn.Linear:
    """Return the output head of a model, if it is a matrix and nothing else.

    Raises:
        TypeError: it is something else, or does something else.
    """
    head = model.get_output_embeddings()
    head = getattr(head, "_fsdp_wrapped_module", head)
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
        own = _seat(head).found(head)
        if own is not None and not _is_forward_of(head, own):
            raise TypeError(
                "model: the forward of its output head was replaced, expected that of nn.Linear: "
                "what the replacement does, such as a cast to fp32, would be left out (log-probs "
                f"are formed in fp32 here). Undo it; or {_WAY_OUT}"
            )
        check_weight(head.weight)
        return head
    kind = f"{type(head).__module__}.{type(head).__name__}"
    raise TypeError(
        f"model: its output head is a {kind}, expected a plain nn.Linear: what that adds, such as "
        f"adapters on the head or quantised weights, would be left out; {_WAY_OUT}"
    )


def check_weight(weight: Tensor) -> None:
    """Raise unless a weight holds the numbers of a matrix; it may be sharded."""
    is_sharded = hasattr(weight, "full_tensor")
    is_plain = type(weight) in (Tensor, nn.Parameter)
    if not (is_sharded or is_plain) or not weight.is_floating_point():
        kind = f"{type(weight).__module__}.{type(weight).__name__}"
        raise TypeError(
            f"model: the weight of its output head is a {kind} of {weight.dtype}, expected a plain "
            f"tensor of floating point numbers; {_WAY_OUT}"
        )


def present_part(head: nn.Linear) -> Part:
    """Return the weight and the bias of a head, from within its forward.

    Only there do FSDP, ZeRO-3 and the offloading of accelerate have them in place: whole, or with
    the rows of this rank of a tensor-parallel group.
    """
    check_weight(head.weight)
    return part_of(head, _seat(head).mesh)
