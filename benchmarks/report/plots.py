"""What the plots of all families share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..variants import Variant
from .page import digits, time_text
from .results import Line, Results

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
}


def bars(
    axis: Any,
    title: str,
    lines: Sequence[Line],
    ratios: Sequence[float | None],
    variants: Iterable[Variant],
    slots: int,
) -> None:
    """Draw the times of variants with how often the first fits into them, `slots` bars high."""
    seconds = [line.median for line in lines]
    names = [line.variant for line in lines]
    axis.barh(names, seconds, color=colors_of(names, variants), height=0.7)
    for k, (line, ratio) in enumerate(zip(lines, ratios, strict=True)):
        factor = "" if ratio is None else f"   {digits(ratio)}x"
        axis.text(line.median * 1.08, k, time_text(line.median) + factor, va="center")
    axis.set_xscale("log")
    if seconds:
        axis.set_xlim(min(seconds) / 2, max(seconds) * 12)
    # Bars of one height in all panels, the first on top.
    axis.set_ylim(slots - 0.4, -0.6)
    head(axis, title)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#e5e5e5")
    axis.set_xlabel("seconds (log scale)")


def colors_of(names: Iterable[str], variants: Iterable[Variant]) -> list[str]:
    """Return the colors of variants that are known by their names."""
    colors = {variant.name: variant.color for variant in variants}
    return [colors[name] for name in names]


def head(axis: Any, title: str) -> None:
    """Put a title over a panel."""
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold")


def top_line(figure: Any, text: str) -> None:
    """Put what is shown, and where it was measured, over a figure."""
    figure.suptitle(text, fontsize=8.5, color="#555555", x=0.01, ha="left")


def caption(results: Results, dtype: str) -> str:
    """Return where a run was made."""
    machine = results.machine
    return (
        f"{machine['cpu']}, {results.threads} threads, torch {machine['torch']}, "
        f"{machine['date']}; {dtype}, medians"
    )
