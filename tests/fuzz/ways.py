"""Unusual forms of an argument: what a caller can make, and nobody expects."""

from __future__ import annotations

import contextlib
import copy
import decimal
import fractions
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from steppo_kernels import StepLayout


class Case(NamedTuple):
    """An unusual argument.

    Attributes:
        name: of the way in which it is unusual.
        made: the argument.
        plain: an ordinary argument of the same meaning; the results must be equal. None where
            there is none: then an end without a crash, or a named error, is right.
    """

    name: str
    made: object
    plain: object | None = None


class Subclass(torch.Tensor):
    """A tensor in all but its name."""


class Wrapper(torch.Tensor):
    """A tensor without memory of its own: its values are another one's."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrap(value: object) -> object:
            return value.inner if isinstance(value, Wrapper) else value

        arguments = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        return function(*arguments[0], **arguments[1])


DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def _bytes(base: torch.Tensor, byte: int) -> torch.Tensor:
    return (base.to(torch.uint8) * byte).view(torch.bool)


def _misaligned(base: torch.Tensor) -> torch.Tensor:
    data = bytearray(1 + base.numel() * base.element_size())
    made = torch.frombuffer(data, dtype=base.dtype, count=base.numel(), offset=1)
    return made.copy_(base.flatten()).reshape(base.shape)


def _strided(base: torch.Tensor) -> torch.Tensor:
    return torch.stack([base, torch.zeros_like(base)], -1)[..., 0]


def _inference(base: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return base.clone()


def _freed(base: torch.Tensor) -> torch.Tensor:
    made = base.clone()
    made.untyped_storage().resize_(0)
    return made


def _fake(base: torch.Tensor) -> torch.Tensor:
    return FakeTensorMode().from_tensor(base)


def _quantised(base: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(base.float(), 0.1, 0, torch.quint8)


def _read_only(base: torch.Tensor) -> torch.Tensor:
    values = base.numpy().copy()
    values.flags.writeable = False
    return torch.from_numpy(values)


def _filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda base: torch.full_like(base, value)


def _one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(base: torch.Tensor) -> torch.Tensor:
        made = base.clone()
        made.view(-1)[base.numel() // 2] = value
        return made

    return make


# Other places and forms of the same values.
_SAME: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed memory": lambda base: base.mT.contiguous().mT,
    "every second entry": _strided,
    "an offset": lambda base: torch.cat([base[:1], base])[1:],
    "misaligned": _misaligned,
    "read-only memory": _read_only,
    "shared memory": lambda base: base.clone().share_memory_(),
    "of inference mode": _inference,
    "a subclass": lambda base: base.clone().as_subclass(Subclass),
    "a Parameter": lambda base: torch.nn.Parameter(base.clone(), requires_grad=False),
    "that wants a gradient": lambda base: base.clone().requires_grad_(),
    "with the negative bit": lambda base: torch._neg_view(-base),
    "an imaginary part": lambda base: torch.complex(base, base).conj().imag.neg(),
    "a real part": lambda base: torch.complex(base, base).conj().real,
    "bytes of 255": lambda base: _bytes(base, 255) if base.dtype is torch.bool else None,
    "bytes of 2": lambda base: _bytes(base, 2) if base.dtype is torch.bool else None,
}

# Forms that torch itself reads as these values, and that no kernel can.
_FOREIGN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse": lambda base: base.to_sparse(),
    "sparse rows": lambda base: base.to_sparse_csr(),
    "nested": lambda base: torch.nested.nested_tensor(list(base)),
    "jagged": lambda base: torch.nested.nested_tensor(list(base), layout=torch.jagged),
    "of mkldnn": lambda base: base.to_mkldnn(),
    "quantised": _quantised,
    "a wrapper": Wrapper,
}

# Shapes and values that may be wrong, and tensors without values.
_OTHER: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "on meta": lambda base: base.to("meta"),
    "fake": _fake,
    "with freed memory": _freed,
    "0-dim": lambda base: base.flatten()[0].clone(),
    "empty": lambda base: base[:0],
    "of no column": lambda base: base[..., :0],
    "shorter": lambda base: base[..., :-1],
    "longer": lambda base: torch.cat([base, base]),
    "one more dimension": lambda base: base[..., None],
    "of five dimensions": lambda base: base[None, None, None],
    "reversed shape": lambda base: base.permute(*range(base.dim())[::-1]),
    "NaN": _filled(float("nan")),
    "inf": _filled(float("inf")),
    "one -inf": _one(-float("inf")),
    "one NaN": _one(float("nan")),
    "one huge": _one(3e38),
    "all 2**62": _filled(2**62),
    "all -(2**62)": _filled(-(2**62)),
    "one 2**31": _one(2**31),
    "one 2**40": _one(2**40),
    "one 2**63 - 1": _one(2**63 - 1),
    "one -(2**63)": _one(-(2**63)),
    "one -2": _one(-2),
    "all 0": _filled(0),
    "all 7": _filled(7),
}


def of_tensor(base: torch.Tensor) -> Iterator[Case]:
    """Yield unusual forms of a tensor."""
    for name, make in _SAME.items():
        made = _try(make, base)
        if made is not None:
            yield Case(name, made, base)
    expanded = base[:1].expand_as(base)
    yield Case("stride 0", expanded, expanded.contiguous())
    zero = torch._efficientzerotensor(base.shape, dtype=base.dtype)
    yield Case("zeros without memory", zero, torch.zeros_like(base))
    for name, make in _FOREIGN.items():
        made = _try(make, base)
        if made is not None:
            yield Case(name, made, base)
    for dtype in DTYPES:
        made = _try(lambda tensor, to=dtype: tensor.to(to), base)
        if made is not None and dtype is not base.dtype:
            yield Case(f"{dtype}", made, made.to(base.dtype))
    for name, make in _OTHER.items():
        made = _try(make, base)
        if made is not None:
            yield Case(name, made)


def of_anything() -> Iterator[Case]:
    """Yield objects that are seldom what a function wants."""
    for made in (
        None, "text", b"bytes", 1, 0, -1, True, 2**31, 2**63, 10**400, 1.5, float("nan"),
        float("inf"), -float("inf"), 1j, [], (), {}, set(), [0.0] * 12, [[0.5], [1, 2]], object(),
        range(4), torch.float32, torch.Tensor, np.zeros((2, 6)), np.zeros(4, dtype=object),
        np.array("a"), fractions.Fraction(1, 2), decimal.Decimal("0.5"), torch.tensor(0.5),
        torch.tensor(3), torch.tensor(float("nan")), torch.zeros(()).to("meta"), torch.zeros(0),
        torch.tensor([0.5]), torch.tensor(1j), torch.Size([2]), torch.device("cpu"), iter([1]),
    ):  # fmt: skip
        yield Case(f"{type(made).__name__} {str(made)[:24]}", made)


def of_number(base: float) -> Iterator[Case]:
    """Yield other types of the same number."""
    for kind in (np.float64, np.float32, np.float16, np.int64, np.int32):
        if float(kind(base)) == base:
            yield Case(f"{kind.__name__}", kind(base), base)
    yield Case("0-dim tensor", torch.tensor(base), base)
    yield Case("0-dim fp64 tensor", torch.tensor(base, dtype=torch.float64), base)


def of_sequence(base: list) -> Iterator[Case]:
    """Yield other containers of the same entries, and entries that are wrong."""
    yield Case("tuple", tuple(base), base)
    yield Case("numpy array", np.array(base), base)
    yield Case("object array", np.array(base, dtype=object), base)
    yield Case("numpy scalars", list(np.array(base)), base)
    for wrong in (None, 1.5, float("nan"), "x", 10**30, -(2**70), [1], 2**63, 1j, b"x"):
        yield Case(f"an entry {str(wrong)[:12]}", [*base[:-1], wrong])
    yield Case("too short", base[:-1])
    yield Case("too long", [*base, *base])
    yield Case("dict", dict.fromkeys(base))
    yield Case("generator", (entry for entry in base))
    if all(isinstance(entry, int) for entry in base):
        for case in of_tensor(torch.tensor(base)):
            yield case._replace(plain=None if case.plain is None else case.plain.tolist())


def of_layout(base: StepLayout) -> Iterator[Case]:
    """Yield layouts that were tampered with: they are refused, or what was done has no effect."""
    yield Case("a copy", copy.copy(base), base)
    yield Case("a deep copy", copy.deepcopy(base), base)
    for name in base.tensors():
        for way, change in _TAMPERED.items():
            made = copy.deepcopy(base)
            try:
                change(made, name)
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
                # Neither torch nor the layout lets this be done.
                continue
            yield Case(f"{name} {way}", made, base)


def _set(make: Callable[[torch.Tensor], object]) -> Callable[[StepLayout, str], None]:
    def change(layout: StepLayout, name: str) -> None:
        object.__setattr__(layout, name, make(getattr(layout, name)))

    return change


_TAMPERED: dict[str, Callable[[StepLayout, str], None]] = {
    "as float": _set(lambda field: field.float()),
    "as int16": _set(lambda field: field.short()),
    "on meta": _set(lambda field: field.to("meta")),
    "a list": _set(lambda field: field.tolist()),
    "shorter": _set(lambda field: field[..., :-1]),
    "empty": _set(lambda field: field[:0]),
    "huge": _set(lambda field: torch.full_like(field, 2**30)),
    "negative": _set(lambda field: torch.full_like(field, -7)),
    "freed": _set(_freed),
    "written to": lambda layout, name: getattr(layout, name).fill_(2**30),
    "written to through data": lambda layout, name: getattr(layout, name).data.fill_(2**30),
    "written to through numpy": lambda layout, name: getattr(layout, name).numpy().fill(2**30),
}


def _try(make: Callable[[torch.Tensor], torch.Tensor | None], base: torch.Tensor) -> object:
    """Make a tensor; None where torch cannot make one of this dtype or shape."""
    try:
        return make(base)
    except (RuntimeError, TypeError, ValueError, OverflowError, IndexError, NotImplementedError):
        return None


class _Nothing(TorchDispatchMode):
    """A mode that sees each operator and changes none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], object]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "a device context": lambda: torch.device("meta"),
    "a dispatch mode": _Nothing,
    "bfloat16 autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "bfloat16 as default": lambda: _default(torch.bfloat16),
    "float64 as default": lambda: _default(torch.float64),
    "anomaly detection": torch.autograd.detect_anomaly,
}
