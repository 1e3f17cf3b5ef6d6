"""Inner loops of a kernel, read from its machine code: instructions and bytes of a thread."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# Instructions of the pipe that does 64 results a clock: comparisons, integers, conversions.
_ALU_NAMES = {
    "FMNMX",
    "HMNMX2",
    "FSETP",
    "FSEL",
    "FSET",
    "ISETP",
    "SEL",
    "IADD3",
    "VIADD",
    "LEA",
    "LOP3",
    "SHF",
    "PRMT",
    "PLOP3",
    "P2R",
    "R2P",
    "MOV",
    "F2FP",
    "I2FP",
    "IMNMX",
    "VIMNMX",
}
# Operations on floating-point numbers; comparisons, selections and conversions are none.
_OPERATIONS = {"FADD": 1, "FMUL": 1, "FFMA": 2, "FMNMX": 1, "MUFU": 1}
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}

_BRANCH = re.compile(r"(@!?U?P\d+ )?BRA\S* (?:!?U?P\w+, )?(LBB\d+)")


@dataclass(frozen=True)
class Loop:
    """An inner loop: what a thread does in one round, branches that lead over code taken.

    Attributes:
        names: instructions.
        loads, stores: those of global memory, by their bytes.
    """

    names: Counter[str]
    loads: Counter[int]
    stores: Counter[int]

    @property
    def loaded(self) -> int:
        """Bytes."""
        return sum(width * count for width, count in self.loads.items())

    @property
    def stored(self) -> int:
        """Bytes."""
        return sum(width * count for width, count in self.stores.items())

    @property
    def counts(self) -> dict[str, int]:
        """Instructions by what limits them; all of them take a slot of a scheduler."""
        return {
            "issue": sum(self.names.values()),
            "ALU": sum(self.names[name] for name in _ALU_NAMES),
            "MUFU": self.names["MUFU"],
            "LSU": sum(self.loads.values()) + sum(self.stores.values()),
        }

    @property
    def operations(self) -> int:
        """Operations on floating-point numbers."""
        return sum(self.names[name] * each for name, each in _OPERATIONS.items())


def loops(sass: str) -> list[Loop]:
    """Return the loops of a kernel that read or write memory."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if line.startswith("LBB"):
            labels[line.rstrip(":\n")] = len(code)
        elif "\t" in line:
            code.append(line.split("\t")[1].strip())
    found = []
    for last, text in enumerate(code):
        back = _BRANCH.match(text)
        if back and labels[back[2]] < last:
            loop = _loop(code, labels, labels[back[2]], last)
            if loop.loads or loop.stores:
                found.append(loop)
    return found


def _loop(code: list[str], labels: dict[str, int], first: int, last: int) -> Loop:
    done = []
    at = first
    while at <= last:
        done.append(code[at])
        branch = _BRANCH.match(code[at])
        # The branch over the block that holds the token is taken in all blocks but one.
        skips = branch and branch[1] and at < labels[branch[2]] <= last
        at = labels[branch[2]] if branch and skips else at + 1
    return loop_of(done)


def loop_of(instructions: Iterable[str]) -> Loop:
    """Return a loop by what a thread does in one round."""
    names: Counter[str] = Counter()
    moves: dict[str, Counter[int]] = {"LDG": Counter(), "STG": Counter()}
    for instruction in instructions:
        name, *marks = re.sub(r"^@!?U?P\w+ ", "", instruction).split()[0].rstrip(";").split(".")
        names[name] += 1
        if name in moves:
            moves[name][next((_WIDTHS[mark] for mark in marks if mark in _WIDTHS), 4)] += 1
    return Loop(names, moves["LDG"], moves["STG"])
