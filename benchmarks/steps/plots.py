"""Times of the variants, and cost against tokens."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from ..modes import COLD, WARM
from ..report.plots import STYLE, bars, caption, head, top_line
from ..report.results import Results
from .variants import ALL, EAGER, FUSED, LAYOUT, MASK

_PANELS = (
    ("policy_loss", "rows 512x512", "steppo_loss, one row per step\n[512, 512]"),
    ("policy_loss", "turns 64x8192", "steppo_loss, multi-turn\n[64, 8192], 24 % action tokens"),
    ("token_loss", "turns 64x8192", "steppo_loss, a ratio a token\n[64, 8192], 24 % action tokens"),
    ("step_gae", "turns 64x8192", "step_gae, multi-turn\n[64, 8192], 24 % action tokens"),
    ("token_gae", "tokens 64x8192", "token-level GAE\n[64, 8192]"),
    ("step_gae", "rows 2688x512", "step GAE from rows\n[2688, 512]"),
)
# By suite and variant: the label, color and marker of a curve.
_CURVES = {
    ("policy_loss", LAYOUT): ("steppo_loss, layout", LAYOUT.color, "o"),
    ("policy_loss", MASK): ("steppo_loss, mask", MASK.color, "s"),
    ("policy_loss", EAGER): ("the same in eager PyTorch", EAGER.color, "^"),
    ("token_gae", FUSED): ("step_gae, a step a token", "#4a78b5", "D"),
    ("segment", FUSED): ("StepLayout.from_mask", "#e0a030", "v"),
}


def draw_speed(results: Results, path: Path) -> None:
    """Draw the cold times of the variants, a panel a case, with a mark at the warm ones."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 8.4), layout="constrained")
        axes = figure.subplots(3, 2)
        for axis, (suite, case, title) in zip(axes.flat, _PANELS, strict=True):
            lines = results.of_case(suite, case, mode=COLD)
            ratios = [
                None if k == 0 else results.ratio(line, lines[0]) for k, line in enumerate(lines)
            ]
            bars(axis, title, lines, ratios, ALL, slots=6)
            warm = results.of_case(suite, case, mode=WARM)
            if lines and warm:
                places = [line.median for line in warm], [line.variant for line in warm]
                axis.plot(*places, "w|", markersize=11, markeredgewidth=2)
                axis.set_xlim(left=min(line.median for line in (*lines, *warm)) / 2)
        top_line(
            figure,
            "Cold times, and how often the first fits into them; white marks are warm times. "
            f"{caption(results, 'fp32')}",
        )
        figure.savefig(path, dpi=150)


def draw_growth(results: Results, path: Path) -> None:
    """Draw time and time per token against tokens: cold, and warm as dots."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        total, each = figure.subplots(1, 2)
        for (suite, variant), (label, color, marker) in _CURVES.items():
            slope = results.slope("tokens", suite, variant, COLD)
            exponent = "" if slope is None else f": tokens$^{{{slope:.2f}}}$"
            style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.6}
            dotted = style | {"linestyle": ":", "marker": "", "linewidth": 1.2}
            for mode, look, text in ((COLD, style, label + exponent), (WARM, dotted, None)):
                curve = sorted(results.curve("tokens", suite, variant, mode).items())
                tokens = [size for size, _ in curve]
                seconds = [line.median for _, line in curve]
                if curve:
                    pairs = zip(seconds, tokens, strict=True)
                    total.plot(tokens, [1e3 * s for s in seconds], label=text, **look)
                    each.plot(tokens, [1e9 * s / n for s, n in pairs], **look)
        for axis, title in ((total, "milliseconds"), (each, "nanoseconds per token")):
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xlabel("tokens")
            head(axis, title)
            axis.grid(color="#e5e5e5")
        if total.get_lines():
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        top_line(figure, f"Cold; dotted: warm. {caption(results, 'fp32')}")
        figure.savefig(path, dpi=150)
