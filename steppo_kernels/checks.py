"""Argument checks. Each names the argument, what it got and what it expected.

Checks look at types, shapes, dtypes and devices, not at values on a GPU, so that no call waits for
one; only `flags`, while a layout is built, does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(name: str, value: object) -> Tensor:
    """Return `value` if it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if type(value) is not Tensor and hasattr(value, "full_tensor"):
        raise TypeError(
            f"{name}: got a DTensor, expected a whole tensor. Of a sharded parameter that is "
            'full_tensor(grad_placements=[Partial("avg")]), or Partial("sum") where the gradients '
            "of ranks add up: without grad_placements, its gradient is that of one rank alone"
        )
    return value


def floating(name: str, value: object, device: torch.device | None = None) -> Tensor:
    """Return `value` if it is a floating point tensor (on `device`, if that is given)."""
    checked = tensor(name, value)
    if checked.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got {checked.dtype}, expected a floating point dtype")
    return checked if device is None else on_device(name, checked, device)


def integer(name: str, value: object, device: torch.device | None = None) -> Tensor:
    """Return `value` if it is an integer tensor (on `device`, if that is given)."""
    checked = tensor(name, value)
    if checked.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name}: got {checked.dtype}, expected an integer dtype")
    return checked if device is None else on_device(name, checked, device)


def integers(name: str, value: Tensor | Sequence[int]) -> Tensor:
    """Return an integer tensor, or a sequence of integers as one."""
    if isinstance(value, Tensor):
        return integer(name, value)
    try:
        made = torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: got {type(value).__name__}, expected integers") from error
    return integer(name, made) if made.numel() else made.to(torch.int64)


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
    """Return `value` if it has as many elements as `shape`."""
    if value.shape != shape and value.numel() != shape.numel():
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected the token shape {tuple(shape)} "
            "or a view of it"
        )
    return value


def token_count(name: str, value: object, shape: torch.Size, device: torch.device) -> Tensor:
    """Return a floating tensor if it has as many elements as `shape`."""
    return as_many(name, floating(name, value, device), shape)


def tokens(
    name: str, value: object, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return a floating tensor with as many elements as `shape`, flat, contiguous, in `dtype`."""
    return flat(token_count(name, value, shape, device), dtype)


def steps_or_tokens(
    name: str, value: object, num_steps: int | None, shape: torch.Size, device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, bool]:  # fmt: skip
    """Return a floating tensor, flat and in `dtype`, and whether it has one entry per token.

    Without `num_steps` it must.
    """
    checked = floating(name, value, device)
    if num_steps is None:
        return tokens(name, checked, shape, device, dtype), True
    if checked.shape == (num_steps,):
        return flat(checked, dtype), False
    if checked.numel() == shape.numel():
        return flat(checked, dtype), True
    raise ValueError(
        f"{name}: got shape {tuple(checked.shape)}, expected one entry per step {(num_steps,)} "
        f"or the token shape {tuple(shape)}"
    )


def flags(
    name: str, value: object, allowed: Iterable[int] | None, device: torch.device | None = None, *,
    wait: bool = True,
) -> Tensor:  # fmt: skip
    """Return a bool, or int or float 0/1, tensor of `allowed` dimensions (None is any) as bool.

    The values are checked where that costs no wait for a GPU, or where `wait` allows one.
    """
    checked = tensor(name, value)
    if allowed is not None:
        dims(name, checked, allowed)
    if device is not None:
        on_device(name, checked, device)
    if checked.dtype == torch.bool:
        return checked
    if checked.dtype not in (*INTEGER_DTYPES, *FLOAT_DTYPES):
        raise TypeError(f"{name}: got {checked.dtype}, expected bool, or int or float of 0/1")
    if torch.compiler.is_compiling() or not (wait or checked.device.type == "cpu"):
        return checked != 0
    ones = checked.to(torch.bool)
    if not torch.equal(ones.to(checked.dtype), checked):
        bad = checked[ones.to(checked.dtype) != checked][0].item()
        raise ValueError(f"{name}: got the value {bad}, expected only 0 and 1")
    return ones


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
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a number or tensor")
        _finite(name, value, positive=True)
        return None, float(value)
    checked = tokens(name, value, shape, device, torch.float64).detach()
    if checked.device.type == "cpu" and not torch.compiler.is_compiling():
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
    return flat(checked, dtype)


def scalar(
    name: str, value: object, device: torch.device, *, positive: bool = False,
    or_zero: bool = False,
) -> Tensor | None:  # fmt: skip
    """Return a number or 0-dim tensor as a 0-dim tensor; a number becomes one on the CPU.

    Kernels take a 0-dim CPU tensor as a plain argument, as torch's own operators do.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected a 0-dim tensor")
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name}: got {value.dtype}, expected a real number")
        if value.device.type != "cpu":
            on_device(name, value, device)
        elif not torch.compiler.is_compiling():
            _finite(name, value.item(), positive, or_zero)
        return value.detach().to(torch.float64)
    number = _number(name, value, "a number or 0-dim tensor")
    _finite(name, number, positive, or_zero)
    return torch.tensor(float(number), dtype=torch.float64, device="cpu")


def normalizer(value: object, device: torch.device, is_empty: bool) -> Tensor | None:
    """Return what replaces the denominator of a reduction; None if nothing does.

    Where a batch is known to be empty, there is nothing to divide, and 0 is what normalizers of
    its parts add up to.
    """
    checked = scalar("normalizer", value, device, positive=True, or_zero=is_empty)
    return None if is_empty else checked


def fraction(name: str, value: object) -> float:
    """Return `value` if it is a number in [0, 1]."""
    number = _number(name, value, "a number in [0, 1]")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name}: got {value!r}, expected a number in [0, 1]")
    return float(number)


def positive_number(name: str, value: object) -> float:
    """Return `value` if it is a finite number above 0."""
    number = _number(name, value, "a finite number above 0")
    _finite(name, number, positive=True)
    return float(number)


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


def wants_gradient(*values: Tensor | None) -> bool:
    """Return whether autograd is to record what kernels make of `values`.

    Raises:
        RuntimeError: one is a dual number of forward mode, whose tangent would be lost.
    """
    given = [value for value in values if value is not None]
    is_forward = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    if is_forward and any(forward_ad.unpack_dual(value).tangent is not None for value in given):
        raise RuntimeError(
            "forward-mode differentiation: got a dual number, expected reverse mode alone"
        )
    return torch.is_grad_enabled() and any(value.requires_grad for value in given)


def _number(name: str, value: object, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {expected}")
    return value


def _finite(name: str, value: float, positive: bool, or_zero: bool = False) -> None:
    # Comparisons, which compiled code can put off where a number changes from call to call.
    if or_zero and value == 0:
        return
    if not (0.0 if positive else -math.inf) < value < math.inf:
        expected = "a finite number above 0" if positive else "a finite number"
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def _or(allowed: Iterable[int]) -> str:
    return " or ".join(str(n) for n in allowed)
