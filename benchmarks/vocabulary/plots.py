"""Times and memory of the variants, and both against shares and the vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from ..report.page import number
from ..report.plots import STYLE, bars, caption, colors_of, head, top_line
from ..report.results import Line, Results
from .variants import ALL

_LOGITS, _HEAD = "[256, 151936]", "1024 tokens, 8 steps of 32, V 151936"
_AXES = {
    "share": "action tokens, % of 512",
    "live": "steps not clipped, % of 16",
    "vocabulary": "V",
}


def draw_speed(results: Results, path: Path) -> None:
    """Draw the times on logits, and times and memory from hidden states."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 8.6), layout="constrained")
        axes = figure.subplots(2, 2, height_ratios=[5, 14])
        for axis, suite, title in (
            (axes[0, 0], "log_probs_forward", "token_log_probs, forward"),
            (axes[0, 1], "log_probs_both", "token_log_probs, forward + backward"),
            (axes[1, 0], "linear_loss", "linear_steppo_loss, forward + backward"),
        ):
            case = _HEAD if suite == "linear_loss" else _LOGITS
            shape = "1024 tokens, 256 in steps, d 896, V 151936" if case == _HEAD else _LOGITS
            lines = results.of_case(suite, case)
            ratios = [results.ratio(line, lines[0]) for line in lines]
            ratios[:1] = [None] * len(ratios[:1])
            bars(axis, f"{title}\n{shape}", lines, ratios, ALL, slots=max(5, len(lines)))
        _memory(axes[1, 1], results.of_case("linear_loss", _HEAD))
        top_line(figure, f"How often the first fits into the others. {caption(results, 'bf16')}")
        figure.savefig(path, dpi=150)


def _memory(axis: Any, lines: list[Line]) -> None:
    """Draw what the variants hold beyond the gradients that they return."""
    measured = [(line, found) for line in lines if (found := line.over_turns("extra_bytes"))]
    names = [line.variant for line, _ in measured]
    sizes = [found / 2**20 for _, found in measured]
    axis.barh(names, sizes, color=colors_of(names, ALL), height=0.7)
    for k, size in enumerate(sizes):
        axis.text(size + max(sizes) / 100, k, number(size), va="center")
    axis.set_ylim(max(5, len(lines)) - 0.4, -0.6)
    axis.margins(x=0.15)
    head(axis, "the same: peak memory\nbeyond the returned gradients")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#e5e5e5")
    axis.set_xlabel("MiB")


def draw_curves(results: Results, path: Path) -> None:
    """Draw time and extra memory, a column for each of what varies."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 6.4), layout="constrained")
        axes = figure.subplots(2, len(_AXES))
        handles: dict[str, Any] = {}
        known = {variant.name: variant for variant in ALL}
        for (name, label), (time, memory) in zip(_AXES.items(), axes.T, strict=True):
            for (of, _, variant, _), curve in results.curves.items():
                if of != name:
                    continue
                points = sorted(curve.items())
                places = [x for x, _ in points]
                style = {
                    "color": known[variant].color,
                    "marker": known[variant].marker,
                    "markersize": 5,
                    "linewidth": 1.6,
                }
                (handles[variant],) = time.plot(places, [ln.median for _, ln in points], **style)
                extra = [(ln.over_turns("extra_bytes") or 0) / 2**20 for _, ln in points]
                memory.plot(places, extra, **style)
            for axis, title in ((time, "seconds"), (memory, "MiB beyond the gradients")):
                if name == "vocabulary":
                    axis.set_xscale("log")
                    axis.set_yscale("log")
                else:
                    axis.set_ylim(bottom=0)
                axis.set_xlabel(label)
                head(axis, title)
                axis.grid(color="#e5e5e5")
        if handles:
            figure.legend(
                handles.values(),
                handles.keys(),
                loc="outside lower center",
                ncols=len(handles),
                frameon=False,
                fontsize=9,
            )
        top_line(figure, f"linear_steppo_loss, d = 896. {caption(results, 'bf16')}")
        figure.savefig(path, dpi=150)
