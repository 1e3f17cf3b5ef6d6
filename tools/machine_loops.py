"""The loops of a kernel, found in its machine code.

Addresses alone do not tell: a compiler puts what is rarely done behind a loop, and a branch leads
back from there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
# Where a branch leads to. A call has the address of a function, or that of code behind a loop.
_TARGET = re.compile(r"\b(?:BRA|CALL)\b.*\b0x([0-9a-f]+)")
# Nothing goes on behind these. Where a branch by a table leads is not in the code.
_ENDS = re.compile(r"(BRA 0x[0-9a-f]+|EXIT|RET|BRX|BRXU|JMX|KILL)\b")


class Loop(NamedTuple):
    """A loop.

    Attributes:
        code: its instructions, with those of the loops inside of it.
        own: those that no loop inside of it has.
    """

    code: tuple[str, ...]
    own: tuple[str, ...]

    @property
    def is_innermost(self) -> bool:
        """Whether no loop is inside of it."""
        return self.code == self.own


class Flow(NamedTuple):
    """The instructions of a kernel by how often they run.

    Attributes:
        loops: the loops, by where they begin.
        once: what lies in none of them, and can be come to without a table.
    """

    loops: tuple[Loop, ...]
    once: tuple[str, ...]


@functools.cache
def flow_of(code: str) -> Flow:
    """Return the loops of a kernel, and the rest of it.

    Raises:
        ValueError: a loop has several entries, so that nothing is inside of it alone.
    """
    lines = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(code)]
    ranges, following = _blocks(lines)
    graph = _graph(following)
    bodies: dict[int, set[int]] = {}
    for block, place in graph.places.items():
        for to in following[block]:
            if to in graph.dominating(block):
                bodies.setdefault(to, {to}).update(graph.body(to, block))
            elif graph.places[to] <= place:
                raise ValueError(f"the loop at {lines[ranges[to].start][0]:#x} has several entries")

    def text(of: Iterable[int]) -> tuple[str, ...]:
        return tuple(lines[at][1] for block in sorted(of) for at in ranges[block])

    found = []
    for _, body in sorted(bodies.items()):
        inside = [other for other in bodies.values() if other < body]
        found.append(Loop(text(body), text(body.difference(*inside))))
    return Flow(tuple(found), text(set(graph.places).difference(*bodies.values())))


# The numbers of the blocks that each block is followed by.
_Following = list[list[int]]


def _blocks(lines: list[tuple[int, str]]) -> tuple[list[range], _Following]:
    """Return the instructions of each block, and what follows it.

    Only the first instruction of a block is branched to, and only the last one branches.
    """
    at_address = {address: at for at, (address, _) in enumerate(lines)}
    targets: dict[int, int] = {}
    ends = set()
    for at, (_, text) in enumerate(lines):
        if jump := _TARGET.search(text):
            targets[at] = at_address[int(jump[1], 16)]
        # Behind a predicate it is one way of two.
        if _ENDS.match(text):
            ends.add(at)
    behind = (at + 1 for at in (*targets, *ends) if at + 1 < len(lines))
    starts = sorted({0, *targets.values(), *behind})
    ranges = [range(*pair) for pair in zip(starts, [*starts[1:], len(lines)], strict=True)]
    numbers = {start: number for number, start in enumerate(starts)}
    following = []
    for number, own in enumerate(ranges):
        last = own[-1]
        to = [numbers[targets[last]]] if last in targets else []
        if last not in ends and number + 1 < len(ranges):
            to.append(number + 1)
        following.append(to)
    return ranges, following


@dataclass
class _Graph:
    """The blocks that can be come to.

    Attributes:
        places: of blocks in an order in which each is before what follows it, but in loops.
        preceding: the blocks before each.
        dominators: the last other block that every way to a block leads through.
    """

    places: dict[int, int]
    preceding: dict[int, list[int]]
    dominators: dict[int, int] = field(default_factory=lambda: {0: 0})

    def dominating(self, block: int) -> Iterator[int]:
        """Yield a block, and those that every way to it leads through."""
        yield block
        while block != self.dominators[block]:
            block = self.dominators[block]
            yield block

    def common(self, one: int, other: int) -> int:
        """Return the last block that every way to either of two leads through."""
        while one != other:
            if self.places[one] > self.places[other]:
                one = self.dominators[one]
            else:
                other = self.dominators[other]
        return one

    def body(self, first: int, last: int) -> set[int]:
        """Return the blocks from which `last` is come to without passing `first`."""
        found, left = {first}, [last]
        while left:
            block = left.pop()
            if block not in found:
                found.add(block)
                left += self.preceding[block]
        return found


def _graph(following: _Following) -> _Graph:
    order = _order(following)
    preceding: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for to in following[block]:
            preceding[to].append(block)
    graph = _Graph({block: place for place, block in enumerate(order)}, preceding)
    changes = True
    while changes:
        changes = False
        for block in order[1:]:
            known = [one for one in preceding[block] if one in graph.dominators]
            last = functools.reduce(graph.common, known)
            changes = changes or graph.dominators.get(block) != last
            graph.dominators[block] = last
    return graph


def _order(following: _Following) -> list[int]:
    """Return the blocks that can be come to, each before what follows it but in loops."""
    left = [(0, iter(following[0]))]
    seen, done = {0}, []
    while left:
        block, ways = left[-1]
        to = next((to for to in ways if to not in seen), None)
        if to is None:
            done.append(block)
            left.pop()
        else:
            seen.add(to)
            left.append((to, iter(following[to])))
    return done[::-1]
