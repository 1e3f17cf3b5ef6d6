"""The one-pass loss, part by part: operations, bytes, times, and what chunks change."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from steppo_kernels.log_probs import lm_head
from steppo_kernels.log_probs.weight_gradient import GPU_SLICE

from .assumptions import (
    BANDWIDTH,
    FLOPS,
    HIDDEN,
    MEMORY,
    MEMORY_SHARE,
    PRODUCT_SHARE,
    ROWS,
    SMALL_CHUNK,
    TARGETS,
    VOCABULARY,
)
from .kernels import logits_kernels
from .text import cells, header, milliseconds

_COLUMNS = [f"f = {live:g}: {how}" for live in TARGETS for how in ("peaks", "in practice")]


@dataclass(frozen=True)
class Part:
    """What a part of the one-pass loss does, as sums of products of the page's letters.

    Attributes:
        name: what it is.
        work: operations of matrix products.
        moved: bytes; those of a product move while it computes.
        vector: operations of a token outside of products.
    """

    name: str
    work: str
    moved: str
    vector: float = 0.0

    def operations(self, sizes: dict[str, float]) -> float:
        """Return how many there are."""
        return _amount(self.work, sizes) + self.vector * sizes["M"]

    def bytes(self, sizes: dict[str, float]) -> float:
        """Return how many it moves."""
        return _amount(self.moved, sizes)

    def seconds(self, sizes: dict[str, float], product: float, memory: float) -> float:
        """Return its time at these shares of the peaks."""
        computes = _amount(self.work, sizes) / (product * FLOPS)
        return max(computes, self.bytes(sizes) / (memory * BANDWIDTH))


def _amount(work: str, sizes: dict[str, float]) -> float:
    """Return what a formula such as "2 f M V + 4 V d" comes to."""
    return sum(
        math.prod(sizes[factor] if factor in sizes else float(factor) for factor in term.split())
        for term in work.split(" + ")
        if term
    )


def sizes_of(live: float, chunk: int) -> dict[str, float]:
    """Return what the letters of formulas stand for."""
    rows = live * min(chunk, ROWS)
    return {
        "M": ROWS,
        "d": HIDDEN,
        "V": VOCABULARY,
        "f": live,
        "n": math.ceil(ROWS / chunk),
        "s": math.ceil(VOCABULARY / GPU_SLICE),
        # The rows that are kept before there are too many: those of whole chunks.
        "k": HIDDEN // rows * rows,
    }


def parts(live: float, chunk: int, changed: int = 0) -> list[Part]:
    """Return the parts of the one-pass loss in bf16, with the first `changed` changes made."""
    chunks = math.ceil(ROWS / chunk)
    vector = {
        each.part: each.operations
        for each in logits_kernels()
        if (each.dtype, each.rows) == ("fp32", "aligned")
    }
    found = [
        Part("logits = H W'", "2 M d V", "2 n V d + 2 M d + 4 M V"),
        Part("row statistics", "", "4 M V", vector["forward"]),
        Part("gradient rows", "", "6 f M V", live * vector["backward + halved"]),
        Part("dH = dZ W", "2 f M d V", "2 f M V + 2 n V d + 2 f M d"),
    ]
    if chunks == 1:
        return [
            *found,
            Part("dW = dZ' H", "2 f M d V", "2 f M V + 2 f M d + 2 V d"),
            Part("dW scaled", "", "4 V d"),
        ]
    # A copy reads and writes a row in bf16, and the rows of a slice are put together in another.
    copies = 1 if changed > 1 else 2
    if live * ROWS <= HIDDEN:
        return [
            *found,
            Part("rows kept", "", f"{4 * copies} f M V"),
            Part("dW = dZ' H", "2 f M d V", "2 f M V + 2 s f M d + 2 V d"),
            Part("dW scaled", "", "4 V d"),
        ]
    # The first product is written, the others are added to what is read.
    return [
        *found,
        Part("rows kept before they are too many", "", f"{4 * copies - 4} k V"),
        Part("dW += dZ' H", "2 f M d V", f"2 f M V + 2 f M d + {8 * chunks - 4} V d"),
        Part("dW rounded, scaled", "", "6 V d" if changed else "10 V d"),
    ]


def _times(chunk: int, changed: int = 0) -> list[list[float]]:
    """Return the times of each part: by f, at the peaks and in practice."""
    shares = ((1.0, 1.0), (PRODUCT_SHARE, MEMORY_SHARE))
    columns = [
        [part.seconds(sizes_of(live, chunk), *share) for part in parts(live, chunk, changed)]
        for live in TARGETS
        for share in shares
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _totals(chunk: int, changed: int = 0) -> list[float]:
    return [sum(column) for column in zip(*_times(chunk, changed), strict=True)]


def one_pass() -> list[str]:
    """Return the lines of the table of the one-pass loss, with the chunk that a GPU gets."""
    chunk = default_chunk()
    sizes = sizes_of(1.0, chunk)
    lines = [
        f"n = {sizes['n']} of {chunk} rows, s = {sizes['s']}; KB are thousands of bytes.",
        "",
        *header(
            "part",
            "operations",
            "bytes",
            "operations a token, f = 1",
            "bytes a token, f = 1",
            *_COLUMNS,
        ),
    ]
    found = parts(1.0, chunk)
    for part, times in zip(found, _times(chunk), strict=True):
        lines.append(
            cells(
                part.name,
                part.work or "none in products",
                part.moved,
                *_a_token([part], sizes),
                *milliseconds(times),
            )
        )
    lines.append(cells("**total**", "", "", *_a_token(found, sizes), *milliseconds(_totals(chunk))))
    few = sizes_of(0.3, chunk)
    operations, moved = _a_token(parts(0.3, chunk), few)
    totals = _totals(chunk)[1::2]
    met = ", ".join(
        f"f = {live:g}: {1e3 * total:.1f} ms of {1e3 * target:.0f} ms, "
        + ("met" if total <= target else "missed")
        for (live, target), total in zip(TARGETS.items(), totals, strict=True)
    )
    return [
        *lines,
        "",
        f"A token takes {operations} operations and moves {moved} at f = 0.3.",
        f"Targets, in practice, on paper: {met}.",
    ]


def _a_token(found: list[Part], sizes: dict[str, float]) -> tuple[str, str]:
    """Return operations and bytes of a token."""
    operations = sum(part.operations(sizes) for part in found) / ROWS
    moved = sum(part.bytes(sizes) for part in found) / ROWS
    return f"{operations / 1e6:,.1f} M", f"{moved / 1e3:,.0f} KB"


def chunks() -> list[str]:
    """Return the lines of the table of chunk sizes."""
    lines = header("rows of a chunk", "n", "logits of a chunk", *_COLUMNS)
    for chunk in sorted({512, 1024, SMALL_CHUNK, default_chunk()}):
        size = f"{4 * chunk * VOCABULARY / 2**30:.2f} GiB"
        lines.append(cells(chunk, math.ceil(ROWS / chunk), size, *milliseconds(_totals(chunk))))
    return lines


def changes() -> list[str]:
    """Return the lines of the table of what would make several chunks cheaper, step by step."""
    lines = header(f"{SMALL_CHUNK} rows, change, with those above", *_COLUMNS)
    for changed, name in enumerate(
        (
            "as it is",
            "rounding dW also scales it",
            "gradients are written to where their rows are kept",
        )
    ):
        lines.append(cells(name, *milliseconds(_totals(SMALL_CHUNK, changed))))
    targets = (cell for target in TARGETS.values() for cell in ("", f"{1e3 * target:.0f} ms"))
    return [*lines, cells("target", *targets)]


def default_chunk() -> int:
    """Return the rows of a chunk on a GPU if none are given."""
    weight = torch.empty((VOCABULARY, HIDDEN), dtype=torch.bfloat16, device="meta")
    head = lm_head.Head(weight, None, None, 1.0, 0.0, "triton")
    return min(ROWS, lm_head.rows_within(MEMORY // lm_head._GPU_SHARE, head))
