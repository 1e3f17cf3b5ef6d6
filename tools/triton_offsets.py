"""What a kernel adds to its pointers, read from Triton's IR: whether 32 bits may be too few.

A tensor of logits has more than 2^31 elements long before it fills a GPU; no test can hold one.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

PROGRAM = "program"
_SIGNATURE = re.compile(r"%(\w+): (!tt\.ptr<\w+>|\w+)")
_ASSIGNED = re.compile(r'\s*(%\w+)(?::\d+)? = "?([\w.]+)"?(.*)')
_LOOP = re.compile(r"scf\.for (%\w+) = (%[\w#]+) to (%[\w#]+) step (%[\w#]+)")
_CARRIED = re.compile(r"(%\w+) = (%[\w#]+)")
_NAME = re.compile(r"%\w+(?:#\d+)?")
# Operations on whose result an operand has no bearing that matters here.
_OPAQUE = {"tt.load", "arith.cmpi", "arith.cmpf", "scf.if", "scf.for", "tt.reduce", "tt.scan"}


class _Value(NamedTuple):
    """Where a value comes from.

    Attributes:
        kind: the operation that made it.
        operands: its operands' names.
        leaves: scalar arguments that it depends on, and `PROGRAM`.
        narrow: 32-bit operations on the way that may overflow.
        pointer: the pointer argument that it is in, or "".
    """

    kind: str = ""
    operands: tuple[str, ...] = ()
    leaves: frozenset[str] = frozenset()
    narrow: frozenset[str] = frozenset()
    pointer: str = ""


def offsets(ttir: str) -> dict[str, Any]:
    """Return what is added to the pointer arguments of a kernel.

    ``offsets`` has, of what is added to an argument itself, its name, the width and the scalar
    arguments in it. ``narrow`` has the 32-bit operations that any offset depends on and that may
    overflow: products and sums with a program's number or an argument in them, and what is cut
    from 64 bits. What is loaded (ids of steps, numbers of rows) fits, and so does a product that
    undoes a division.
    """
    values: dict[str, _Value] = {}
    added: set[tuple[str, str, tuple[str, ...]]] = set()
    narrow: set[str] = set()
    for line in ttir.splitlines():
        text = re.sub(r" loc\(.*", "", line)
        if "tt.func" in line:
            for name, kind in _SIGNATURE.findall(line):
                is_pointer = kind.startswith("!")
                values[f"%{name}"] = _Value(
                    "argument",
                    leaves=frozenset(() if is_pointer else (name,)),
                    pointer=name if is_pointer else "",
                )
            continue
        if found := _LOOP.search(text):
            values[found[1]] = _joined("loop", found.groups()[1:], values)
            for name, first in _CARRIED.findall(text.partition("iter_args(")[2]):
                values[name] = _joined("loop", (first,), values)
        if not (match := _ASSIGNED.match(text)):
            continue
        name, kind, rest = match.groups()
        operands = tuple(_NAME.findall(rest))
        if kind == "tt.addptr":
            base, offset = (values.get(each, _Value()) for each in operands)
            narrow |= offset.narrow
            if base.kind == "argument":
                width = "i64" if re.search(r"\bi64>?$|xi64>", rest.split(", ")[-1]) else "i32"
                added.add((base.pointer, width, tuple(sorted(offset.leaves))))
            values[name] = _Value(kind, operands, pointer=base.pointer)
        elif kind == "tt.get_program_id":
            values[name] = _Value(kind, leaves=frozenset((PROGRAM,)))
        elif kind in _OPAQUE:
            values[name] = _Value(kind, operands)
        else:
            value = _joined(kind, operands, values)
            if re.search(r"\bi32>?\s*$|xi32>\s*$", rest) and _may_overflow(value, values):
                value = value._replace(narrow=value.narrow | {text.strip()})
            values[name] = value
    return {"offsets": sorted(added), "narrow": sorted(narrow)}


def _joined(kind: str, operands: tuple[str, ...], values: dict[str, _Value]) -> _Value:
    found = [values.get(each, _Value()) for each in operands]
    return _Value(
        kind,
        operands,
        frozenset().union(*(each.leaves for each in found)),
        frozenset().union(*(each.narrow for each in found)),
        next((each.pointer for each in found if each.pointer), ""),
    )


def _may_overflow(value: _Value, values: dict[str, _Value]) -> bool:
    """Say so of a 32-bit integer."""
    parts = [values.get(each, _Value()) for each in value.operands]
    if value.kind == "arith.trunci":
        return parts[0].kind != "tt.load"
    if value.kind == "arith.muli":
        undone = any(
            each.kind == "arith.divsi" and each.operands[1] == other
            for each, other in zip(parts, reversed(value.operands), strict=True)
        )
        return bool(value.leaves) and not undone
    # A count of steps or rows is rounded up to blocks so.
    is_rounded = {each.kind for each in parts} == {"argument", "arith.constant"}
    return value.kind in ("arith.addi", "arith.shli") and bool(value.leaves) and not is_rounded
