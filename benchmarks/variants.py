"""What is measured side by side: one list entry a variant, with everything that is fixed about it.

A label stands in one place. Suites choose by the objects, and reports look their names up there,
so that a renamed variant keeps its color, its turns and its promises.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

GREY = "#888888"


@dataclass(frozen=True)
class Variant:
    """One way to do the work of a case; two of one name are the same variant.

    Attributes:
        name: what the JSON, pages and pictures call it.
        color, marker: of its bars and curves.
        turns: in how many turns it takes part; None is all of them.
        rounds: calls in a turn; None is as many as fit into a fixed time.
        project: the peer that it needs, by its name on PyPI; None is torch or this package.
    """

    name: str
    color: str = field(default=GREY, compare=False)
    marker: str = field(default="s", compare=False)
    turns: int | None = field(default=None, compare=False)
    rounds: int | None = field(default=None, compare=False)
    project: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.name

    def timed(self, turns: int | None = None, rounds: int | None = None) -> Variant:
        """Return the variant with other turns and rounds."""
        return replace(self, turns=turns, rounds=rounds)
