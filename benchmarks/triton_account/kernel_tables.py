"""Tables of the kernels: what they are compiled to, what a token costs, where targets are met."""

from __future__ import annotations

import itertools

from .assumptions import DTYPES, LATENCIES, MEMORY_SHARE, PROCESSORS, RATES, SHAPES, VOCABULARY
from .kernels import logits_kernels
from .text import cells, header


def code() -> list[str]:
    """Return the lines of the table of what the kernels are compiled to."""
    lines = header(
        "kernel",
        "logits",
        "registers",
        "warps / SM",
        "loads",
        "stores",
        "KB in flight / SM",
        "operations",
        "instructions",
        "ALU",
        "MUFU",
    )
    for each in logits_kernels():
        counts = each.loop.counts
        moves = [
            " + ".join(f"{count} x {8 * width} bits" for width, count in sorted(found.items()))
            or "none"
            for found in (each.loop.loads, each.loop.stores)
        ]
        lines.append(
            cells(
                each.part,
                f"{each.dtype}, {each.rows}",
                each.registers,
                each.warps,
                *moves,
                f"{each.in_flight / 1024:.0f}",
                f"{each.loop.operations / each.logits:.1f}",
                *(f"{counts[name] / each.logits:.1f}" for name in ("issue", "ALU")),
                f"{counts['MUFU'] / each.logits:.2f}",
            )
        )
    return lines


def tokens() -> list[str]:
    """Return the lines of the table of what a token costs."""
    lines = header(
        "kernel",
        "logits",
        "bytes",
        "operations",
        "instructions",
        *(f"{name} ms" for name in ("memory", *RATES)),
        "bound by",
        "bandwidth",
        f"{MEMORY_SHARE:.0%} met",
    )
    for each in logits_kernels():
        seconds, shares = each.seconds, each.shares(LATENCIES[0])
        instructions = VOCABULARY * each.loop.counts["issue"] / each.logits
        lines.append(
            cells(
                each.part,
                f"{each.dtype}, {each.rows}",
                f"{each.moved:,.0f}",
                f"{each.operations / 1e6:.2f} M",
                f"{instructions / 1e6:.2f} M",
                *(f"{1e3 * value:.2f}" for value in seconds.values()),
                min(shares, key=shares.__getitem__),
                f"{min(shares.values()):.0%}",
                each.verdict,
            )
        )
    return lines


def targets() -> list[str]:
    """Return the lines that say where the target of the kernels is met."""
    lines = []
    for verdict, text in (
        ("yes", "met on paper"),
        ("doubtful", "doubtful: met with the short latency and caches that merge sectors"),
        ("no", "missed on paper"),
    ):
        lines.append(f"- **{text}**:")
        for dtype, rows in itertools.product(DTYPES, SHAPES):
            found = [
                each
                for each in logits_kernels()
                if (each.dtype, each.rows, each.verdict) == (dtype, rows, verdict)
            ]
            if found:
                names = ", ".join(
                    f"{each.part} ({each.share(LATENCIES[0]):.0%})"
                    if verdict == "no"
                    else f"{each.part} ({each.worst_share:.0%} at worst)"
                    if verdict == "doubtful"
                    else each.part
                    for each in found
                )
                lines.append(f"    - {dtype}, {rows}: {names}")
        if lines[-1].endswith("**:"):
            lines[-1] += " none"
    programs = [PROCESSORS * each.warps * 32 // each.threads for each in logits_kernels()]
    lines.append(
        f"- a program a row: fewer rows than {min(programs)} to "
        f"{max(programs)}, by the kernel, do not fill the GPU once"
    )
    return lines
