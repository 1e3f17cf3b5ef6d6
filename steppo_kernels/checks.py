"""Argument checks. Each names the argument, what it got and what it expected.

Checks look at types, shapes, dtypes and devices, not at values on a GPU, so that no call waits for
one; only `flags`, while a layout is built, does.

Every tensor enters through `tensor`. What it returns is plain: dense memory that holds the values
which torch reads. A caller goes on with what it returned, not with what it was given.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.compiler import is_compiling

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (*HALF_DTYPES, torch.float32, torch.float64)

_PLAIN = (Tensor, torch.nn.Parameter)
# What is given in the place of a tensor that it holds: results of functions, and a head.
_HELD = ("advantages", "weights", "weight")


def is_ready(value: object, dtype: torch.dtype, device: torch.device) -> TypeGuard[Tensor]:
    """Return whether kernels take `value` as it is, like almost every tensor of almost every call.

    Whatever else comes takes the way through `tensor`, which finds the right word for it.
    """
    if type(value) is not Tensor or is_compiling():
        return False
    try:
        return (
            value.dtype is dtype
            and value.device == device
            and value.is_contiguous()
            and not (value.is_neg() or value.is_nested or value.is_inference())
            and (address := value.data_ptr()) != 0
            and address % 8 == 0
        )
    except RuntimeError:
        # What is no dense memory raises for its address, if not before.
        return False


def tensor(name: str, value: object, *, saved: bool = True) -> Tensor:
    """Return `value` if it is a tensor, as one whose memory can be read as it is.

    That is the same tensor, or a copy where memory alone does not tell the values: with the
    negative bit, of inference mode where autograd may want to save it, at an odd address. Nothing
    is copied for autograd if `saved` is False.

    Raises:
        TypeError: it is no tensor, or of a kind that is not dense memory.
        ValueError: it has no memory.
    """
    if type(value) in _PLAIN:
        assert isinstance(value, Tensor)
        # What a compiler traces holds no values yet, and is made plain by it.
        if is_compiling():
            return value
        # One test for almost every tensor of almost every call. Some kinds raise for an address.
        try:
            if (
                value.layout is torch.strided
                and not value.is_nested
                and not value.is_neg()
                and not (saved and value.is_inference())
                and (address := value.data_ptr())
                and address % value.itemsize == 0
            ):
                return value
        except RuntimeError:
            pass
    checked = dense(name, value)
    if is_compiling():
        return checked
    if checked.is_meta:
        raise ValueError(f"{name}: got a tensor on meta, expected one that holds values")
    if checked._is_zerotensor():
        checked = torch.zeros_like(checked)
    if checked.is_neg():
        checked = checked.resolve_neg()
    if saved and checked.is_inference() and torch.is_grad_enabled():
        # Autograd refuses to save a tensor of inference mode.
        with torch.inference_mode(False):
            checked = checked.clone()
    address = _address(checked)
    if address == 0 and checked.numel():
        raise ValueError(f"{name}: got a tensor without memory, expected one that holds values")
    return checked if not address or address % checked.itemsize == 0 else checked.clone()


def dense(name: str, value: object) -> Tensor:
    """Return `value` as a plain tensor if it is a dense one, with or without memory."""
    if not isinstance(value, Tensor):
        held = (own for own in _HELD if isinstance(getattr(value, own, None), Tensor))
        hint = "".join(f", such as its .{own}" for own in held)
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor{hint}")
    kind = type(value)
    if kind not in _PLAIN and hasattr(value, "full_tensor"):
        raise TypeError(
            f"{name}: got a DTensor, expected a whole tensor. Of a sharded parameter that is "
            'full_tensor(grad_placements=[Partial("avg")]), or Partial("sum") where the gradients '
            "of ranks add up: without grad_placements, its gradient is that of one rank alone. The "
            "rows of an output head that is split over ranks, Shard(0), come with tp_group"
        )
    what = None
    if value.is_nested:
        what = "a nested tensor"
    elif value.layout is not torch.strided:
        what = f"a tensor of layout {value.layout}"
    elif value.is_quantized:
        what = "a quantised tensor"
    elif kind not in _PLAIN and not _reads_as_torch(kind):
        what = f"a {kind.__name__}"
    elif torch._C._functorch.is_functorch_wrapped_tensor(value):
        what = "a tensor inside of a torch.func transform"
    if what is not None:
        raise TypeError(f"{name}: got {what}, expected a dense torch.Tensor")
    return value if kind in _PLAIN else value.as_subclass(Tensor)


def _reads_as_torch(kind: type[Tensor]) -> bool:
    """Whether a subclass means what its memory holds: it leaves torch's operators as they are."""

    def way(owner: type[Tensor], name: str) -> object:
        found = getattr(owner, name)
        return getattr(found, "__func__", found)

    return all(
        way(kind, name) in (way(Tensor, name), torch._C._disabled_torch_function_impl)
        for name in ("__torch_function__", "__torch_dispatch__")
    )


def _address(value: Tensor) -> int:
    """Return where the memory of a tensor begins; 0 if it has none."""
    try:
        return value.data_ptr()
    except RuntimeError:
        return 0


def floating(
    name: str, value: object, device: torch.device | None = None, *, saved: bool = True
) -> Tensor:
    """Return `value` if it is a floating point tensor (on `device`, if that is given)."""
    checked = tensor(name, value, saved=saved)
    if checked.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name}: got {checked.dtype}, expected float32, float64, float16 or bfloat16"
        )
    return checked if device is None else on_device(name, checked, device)


def integer(name: str, value: object, device: torch.device | None = None) -> Tensor:
    """Return `value` if it is an integer tensor (on `device`, if that is given)."""
    checked = tensor(name, value)
    if checked.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name}: got {checked.dtype}, expected int64, int32, int16, int8 or uint8")
    return checked if device is None else on_device(name, checked, device)


def on_device(name: str, value: Tensor, device: torch.device) -> Tensor:
    """Return `value` if it lies on `device`."""
    if value.device != device:
        raise ValueError(f"{name}: got a tensor on {value.device}, expected one on {device}")
    return value


def dims(name: str, value: Tensor, allowed: Iterable[int]) -> Tensor:
    """Return `value` if its number of dimensions is one of `allowed`."""
    if value.dim() not in allowed:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected {_or(allowed)} dimensions"
        )
    return value


def same_shape(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """Return `value` if it has this shape."""
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(shape)}")
    return value


def as_many(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """Return `value` if its entries stand in the order of `shape`.

    That is the shape itself, or with dimensions of size 1 more or less, or flat.
    """
    if value.shape != shape and not same_order(value.shape, shape):
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected the token shape {tuple(shape)}, "
            f"flat or as it is"
        )
    return value


def same_order(shape: torch.Size, wanted: torch.Size) -> bool:
    """Return whether `shape` is `wanted` with dimensions of size 1 more or less, or flat."""
    if len(shape) == 1:
        return shape[0] == wanted.numel()
    return [size for size in shape if size != 1] == [size for size in wanted if size != 1]


def in_order(name: str, value: Tensor, shape: torch.Size, what: str) -> Tensor:
    """Return `value` if its dimensions but the last, which counts `what`, fit the token shape."""
    if value.dim() < 1 or not (value.shape[:-1] == shape or same_order(value.shape[:-1], shape)):
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected the token shape {tuple(shape)}, "
            f"flat or as it is, and the {what}"
        )
    return value


def token_shape(token_ids: object, shape: torch.Size) -> torch.Size:
    """Return the shape of tokens whose values have this one: that of the ids, if it is flat."""
    if isinstance(token_ids, Tensor) and shape == (token_ids.numel(),):
        return token_ids.shape
    return shape


def token_count(name: str, value: object, shape: torch.Size, device: torch.device) -> Tensor:
    """Return a floating tensor if it has as many elements as `shape`."""
    return as_many(name, floating(name, value, device), shape)


def tokens(
    name: str, value: object, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return a floating tensor whose entries stand in the order of `shape`, solid in `dtype`."""
    if is_ready(value, dtype, device) and value.shape == shape:
        return value
    return solid(token_count(name, value, shape, device), dtype)


def ready_steps_or_tokens(
    value: object,
    num_steps: int | None,
    shape: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, bool] | None:
    """Return what `steps_or_tokens` does if kernels take `value` as it is, else None."""
    if is_ready(value, dtype, device):
        is_per_step = value.shape == (num_steps,)
        if is_per_step or value.shape == shape:
            return value, not is_per_step
    return None


def steps_or_tokens(
    name: str,
    value: object,
    num_steps: int | None,
    shape: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, bool]:
    """Return a floating tensor, solid in `dtype`, and whether it has one entry per token.

    Without `num_steps` it must. A vector that can be both, as there are as many steps as tokens, is
    read per step; with a dimension of size 1 more it is per token.
    """
    if ready := ready_steps_or_tokens(value, num_steps, shape, device, dtype):
        return ready
    if num_steps is None:
        return tokens(name, value, shape, device, dtype), True
    checked = floating(name, value, device)
    found = checked.shape
    if found == (num_steps,):
        return solid(checked, dtype), False
    if found == shape or same_order(found, shape):
        return solid(checked, dtype), True
    raise ValueError(
        f"{name}: got shape {tuple(found)}, expected one entry per step {(num_steps,)} "
        f"or the token shape {tuple(shape)}"
    )


def flags(
    name: str,
    value: object,
    allowed: Iterable[int] | None,
    device: torch.device | None = None,
    *,
    wait: bool = True,
    any_byte: bool = False,
) -> Tensor:
    """Return a bool, or int or float 0/1, tensor of `allowed` dimensions (None is any) as bool.

    With `any_byte`, bools that are True may have any byte but 0, as compiled kernels read a mask.
    The values are checked where that costs no wait for a GPU, or where `wait` allows one.
    """
    checked = tensor(name, value)
    if allowed is not None:
        dims(name, checked, allowed)
    if device is not None:
        on_device(name, checked, device)
    if checked.dtype == torch.bool:
        return checked if any_byte else ones_of(checked)
    if checked.dtype not in (*INTEGER_DTYPES, *FLOAT_DTYPES):
        raise TypeError(f"{name}: got {checked.dtype}, expected bool, or int or float of 0/1")
    if is_compiling() or not (wait or checked.device.type == "cpu"):
        return checked != 0
    ones = checked.to(torch.bool)
    if not torch.equal(ones.to(checked.dtype), checked):
        bad = checked[ones.to(checked.dtype) != checked][0].item()
        raise ValueError(f"{name}: got the value {bad}, expected only 0 and 1")
    return ones


def ones_of(flags: Tensor) -> Tensor:
    """Return bools whose bytes are 0 and 1, as kernels take them; torch takes any byte but 0."""
    stored = flags.view(torch.uint8)
    if is_compiling() or flags.device.type != "cpu":
        return stored != 0
    # A look at the largest costs a fortieth of a comparison.
    return stored != 0 if flags.numel() and int(stored.max()) > 1 else flags


def row_mask(name: str, value: object, shape: torch.Size, device: torch.device) -> Tensor:
    """Return a bool or 0/1 tensor with as many elements as `shape` as flat bool."""
    checked = as_many(name, flags(name, value, None, device, wait=False), shape)
    return checked.reshape(-1).contiguous()


def token_ids(name: str, value: object, shape: torch.Size, device: torch.device) -> Tensor:
    """Return an integer tensor with as many elements as `shape`, flat and int64."""
    checked = as_many(name, integer(name, value, device), shape)
    return checked.reshape(-1).to(torch.int64).contiguous()


def temperature(
    name: str, value: object, shape: torch.Size, device: torch.device, mask: Tensor | None = None
) -> tuple[Tensor | None, float]:
    """Return temperatures above 0 as (fp64 ``[N]``, 1) if they are by token, else (None, number).

    Where `mask` (bool ``[N]``) is False, they may be anything. Values on a GPU are not looked at.
    """
    if not isinstance(value, Tensor):
        number = _number(name, value, "a number or tensor")
        _finite(name, number, positive=True)
        return None, _float(name, number)
    checked = flat(token_count(name, value, shape, device), torch.float64).detach()
    if checked.device.type == "cpu" and not is_compiling():
        bad = ~((checked > 0) & checked.isfinite())
        if mask is not None:
            bad &= mask
        if bool(bad.any()):
            raise ValueError(
                f"{name}: got {checked[bad][0].item()}, expected finite numbers above 0"
            )
    return checked, 1.0


def vector(
    name: str, value: object, length: int, what: str, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return a floating tensor of shape ``[length]`` in `dtype`; `what` says what it counts."""
    checked = floating(name, value, device)
    if checked.shape != (length,):
        raise ValueError(
            f"{name}: got shape {tuple(checked.shape)}, expected ({length},), one entry per {what}"
        )
    return solid(checked, dtype)


def scalar(
    name: str,
    value: object,
    device: torch.device,
    *,
    positive: bool = False,
    or_zero: bool = False,
) -> Tensor | None:
    """Return a number or 0-dim tensor as a 0-dim tensor; a number becomes one on the CPU.

    Kernels take a 0-dim CPU tensor as a plain argument, as torch's own operators do.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        value = tensor(name, value)
        if value.dim() != 0:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected a 0-dim tensor")
        if value.dtype not in (*INTEGER_DTYPES, *FLOAT_DTYPES):
            raise TypeError(f"{name}: got {value.dtype}, expected a real number")
        if value.device.type != "cpu":
            on_device(name, value, device)
        elif not is_compiling():
            _finite(name, value.item(), positive, or_zero)
        return value.detach().to(torch.float64)
    number = _number(name, value, "a number or 0-dim tensor")
    _finite(name, number, positive, or_zero)
    return torch.tensor(_float(name, number), dtype=torch.float64, device="cpu")


def normalizer(value: object, device: torch.device, is_empty: bool) -> Tensor | None:
    """Return what replaces the denominator of a reduction.

    Where a batch is known to be empty, there is nothing to divide, and 0 is what normalizers of
    its parts add up to: 1 stands in for it, and the batch remains a part of a whole.
    """
    checked = scalar("normalizer", value, device, positive=True, or_zero=is_empty)
    return torch.ones((), dtype=torch.float64, device=device) if is_empty else checked


def fraction(name: str, value: object) -> float:
    """Return `value` if it is a number in [0, 1]."""
    number = _number(name, value, "a number in [0, 1]")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name}: got {value!r}, expected a number in [0, 1]")
    return _float(name, number)


def positive_number(name: str, value: object, *, or_zero: bool = False) -> float:
    """Return `value` if it is a finite number above 0, or 0 where that is one."""
    number = _number(name, value, "a finite number above 0" + ", or 0" * or_zero)
    _finite(name, number, positive=True, or_zero=or_zero)
    return _float(name, number)


def switch(name: str, value: object) -> bool:
    """Return `value` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a bool")
    return value


def count(name: str, value: object, least: int = 1) -> int:
    """Return `value` if it is an integer of at least `least`, of any type."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an integer")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")
    return int(value)


def compute_dtype(value: Tensor) -> torch.dtype:
    """Return the dtype a call computes in: fp64 stays fp64, everything else is fp32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def flat(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `value` as a contiguous vector in `dtype`; gradients flow back to `value`."""
    if value.dtype != dtype:
        value = value.to(dtype)
    if value.dim() != 1:
        value = value.reshape(-1)
    return value.contiguous()


def solid(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `value` contiguous and in `dtype`, of its shape; gradients flow back to it."""
    if value.dtype is not dtype:
        value = value.to(dtype)
    return value if value.is_contiguous() else value.contiguous()


def constant(value: Tensor) -> Tensor:
    """Return `value` without its graph."""
    return value.detach() if value.requires_grad else value


def _number(name: str, value: object, expected: str) -> Any:
    """Return a real number of any type: Python's, numpy's, a fraction."""
    is_number = isinstance(value, (int, float, numbers.Real))
    if isinstance(value, bool) or not is_number:
        raise TypeError(f"{name}: got {type(value).__name__}, expected {expected}")
    return value


def _float(name: str, value: Any) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(
            f"{name}: got a number beyond the range of a float, expected one in it"
        ) from error


def _finite(name: str, value: float, positive: bool, or_zero: bool = False) -> None:
    # Comparisons, which compiled code can put off where a number changes from call to call.
    if or_zero and value == 0:
        return
    if not (0.0 if positive else -math.inf) < value < math.inf:
        expected = "a finite number" + " above 0" * positive + ", or 0" * or_zero
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def _or(allowed: Iterable[int]) -> str:
    return " or ".join(str(n) for n in allowed)
