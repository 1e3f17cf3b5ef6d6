"""The pictures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .results import Run
from .train import IterationReport, TrajectoryTrace

INK, GRID = "#1f2933", "#d9dee4"
BLUE, ORANGE, GREEN, RED = "#2166ac", "#d9730d", "#2e8b57", "#b2333a"
COLOURS = {"StepPO": BLUE, "PPO": ORANGE, "GSPO": GREEN}
TILES = {"S": "#e4f1fa", "H": "#31475e", "G": "#cfead6"}
DPI = 150
# What is smaller, or negative, is drawn as this.
SMALLEST_MOVE = 1e-3


def _figure(width: float, height: float) -> Figure:
    # Not pyplot: it would choose a backend and keep the figure alive.
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Any, title: str, *, x: str = "", y: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def _percent(axes: Any) -> None:
    axes.set_ylim(-0.02, 1.04)
    axes.set_yticks(np.linspace(0, 1, 6), [f"{v:.0%}" for v in np.linspace(0, 1, 6)])


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Return the mean of up to `width` values around each."""
    half = width // 2
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def learning_curve(path: Path, run: Run) -> None:
    """Draw success, losses and the size of the updates over the rounds of one run."""
    figure = _figure(11, 6.2)
    grid = figure.add_gridspec(2, 2, width_ratios=[1.7, 1])
    rounds = [report.iteration for report in run.reports]
    success = [report.success for report in run.reports]

    top = figure.add_subplot(grid[:, 0])
    _style(top, f"{run.method} learns to cross the lake", x="round", y="success")
    top.plot(rounds, success, color=BLUE, alpha=0.3, linewidth=1.2, label="episodes of the round")
    top.plot(rounds, _smooth(success), color=BLUE, linewidth=2.4, label="mean of 5 rounds")
    top.plot(
        [rounds[0] - 1, rounds[-1] + 1],
        [run.before.sampled, run.after.sampled],
        "o",
        color=RED,
        markersize=8,
        label=f"evaluation, {run.after.episodes} episodes",
    )
    note: dict[str, Any] = {"textcoords": "offset points", "color": RED, "fontweight": "bold"}
    top.annotate(
        f"{run.before.sampled:.1%}", (rounds[0] - 1, run.before.sampled), xytext=(8, -13), **note
    )
    top.annotate(
        f"{run.after.sampled:.1%}",
        (rounds[-1] + 1, run.after.sampled),
        xytext=(4, -36),
        ha="right",
        **note,
    )
    _percent(top)
    top.legend(loc="center right", frameon=False)

    losses = figure.add_subplot(grid[0, 1])
    _style(losses, "Losses", x="round")
    for name, label, colour in (
        ("policy_loss", "policy", BLUE),
        ("value_loss", "value", ORANGE),
    ):
        losses.plot(rounds, _metric(run.reports, name), color=colour, linewidth=1.8, label=label)
    losses.legend(frameon=False)

    moves = figure.add_subplot(grid[1, 1])
    _style(moves, "Size of the updates", x="round")
    # The first updates may be a hundred times as large as the last.
    moves.set_yscale("log")
    for name, label, colour in (
        ("clip_fraction", "share of clipped steps", GREEN),
        ("approx_kl", "approximate KL", RED),
    ):
        heights = np.maximum(_metric(run.reports, name), SMALLEST_MOVE)
        moves.plot(rounds, heights, color=colour, linewidth=1.8, label=label)
    moves.set_ylim(bottom=SMALLEST_MOVE)
    moves.legend(frameon=False)
    figure.savefig(path, dpi=DPI)


def _metric(reports: Sequence[IterationReport], name: str) -> list[float]:
    return [report.metrics[name] for report in reports]


def trajectory(path: Path, trace: TrajectoryTrace) -> None:
    """Draw one trajectory: its way over the lake, and value, advantage and ratio of each step."""
    figure = _figure(11, 6.4)
    grid = figure.add_gridspec(3, 2, width_ratios=[1, 1.45])
    _draw_lake(figure.add_subplot(grid[:, 0]), trace)
    steps = np.arange(1, len(trace.actions) + 1)

    values = figure.add_subplot(grid[0, 1])
    _style(values, "Value of the state before the step")
    values.plot(steps, trace.values, "o-", color=BLUE, linewidth=2)
    values.margins(y=0.3)
    _label(values, steps, trace.values, "{:.2f}")

    advantages = figure.add_subplot(grid[1, 1])
    _style(advantages, "Step advantage (whitened over the round)")
    colours = [GREEN if a >= 0 else RED for a in trace.advantages]
    advantages.bar(steps, trace.advantages, color=colours, width=0.55)
    advantages.axhline(0, color=INK, linewidth=0.8)
    advantages.margins(y=0.3)
    _label(advantages, steps, trace.advantages, "{:+.2f}")

    ratios = figure.add_subplot(grid[2, 1])
    _style(ratios, "Step ratio after the round's updates", x="step")
    low, high = 1 - trace.clip, 1 + trace.clip
    ratios.axhspan(low, high, color=ORANGE, alpha=0.15, linewidth=0)
    ratios.axhline(1, color=INK, linewidth=0.8)
    ratios.plot(steps, trace.ratios, "D", color=ORANGE, markersize=8)
    ratios.set_ylim(min(low, *trace.ratios) - trace.clip, max(high, *trace.ratios) + trace.clip)
    ratios.text(
        0.005,
        high,
        "not clipped",
        transform=ratios.get_yaxis_transform(),
        va="top",
        fontsize=8,
        color=INK,
    )
    _label(ratios, steps, trace.ratios, "{:.2f}")

    for axes in (values, advantages, ratios):
        axes.set_xlim(0.4, len(steps) + 0.6)
        axes.set_xticks(steps, [] if axes is not ratios else trace.actions)
    ratios.tick_params(axis="x", labelsize=8)
    for tick in ratios.get_xticklabels():
        tick.set(rotation=20, ha="right")
    ratios.set_xlabel("")
    figure.savefig(path, dpi=DPI)


def _label(axes: Any, steps: np.ndarray, heights: Sequence[float], form: str) -> None:
    for step, height in zip(steps, heights, strict=True):
        above = height >= 0
        axes.annotate(
            form.format(height),
            (step, height),
            xytext=(0, 6 if above else -6),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=8,
            color=INK,
        )


def _draw_lake(axes: Any, trace: TrajectoryTrace) -> None:
    for row, tiles in enumerate(trace.lake):
        for column, tile in enumerate(tiles):
            axes.add_patch(
                Rectangle((column, row), 1, 1, facecolor=TILES[tile], edgecolor="white", lw=2)
            )
            name = {"H": "hole", "G": "goal"}.get(tile, "")
            axes.text(
                column + 0.5,
                row + 0.88,
                name,
                ha="center",
                va="center",
                fontsize=9,
                color="white" if tile == "H" else INK,
            )
    badge = {"boxstyle": "circle,pad=0.25", "facecolor": BLUE, "edgecolor": "white"}
    stays: dict[tuple[int, int], int] = {}
    for number, (start, end) in enumerate(itertools.pairwise(trace.path), start=1):
        south, east = end[0] - start[0], end[1] - start[1]
        if start == end:
            # Against the shore, or not understood: the numbers stand in the cell's corner.
            x = start[1] + 0.14 + 0.19 * stays.get(start, 0)
            y = start[0] + 0.14
            stays[start] = stays.get(start, 0) + 1
        else:
            # Every arrow keeps to its right, so that there and back lie side by side.
            x, y = start[1] + 0.5 - 0.1 * south, start[0] + 0.5 + 0.1 * east
            arrow = {"arrowstyle": "-|>", "color": BLUE, "lw": 2.2, "shrinkA": 0, "shrinkB": 0}
            axes.annotate(
                "",
                (x + 0.88 * east, y + 0.88 * south),
                (x + 0.12 * east, y + 0.12 * south),
                arrowprops=arrow,
            )
            x, y = x + 0.46 * east, y + 0.46 * south
        axes.text(
            x, y, str(number), ha="center", va="center", fontsize=8, color="white", bbox=badge
        )
    row, column = trace.path[0]
    axes.plot(
        column + 0.5, row + 0.5, "o", color=RED, markersize=11, markeredgecolor="white", mew=2
    )
    axes.text(column + 0.07, row + 0.88, "start", va="center", fontsize=9, color=INK)
    axes.set_xlim(0, len(trace.lake[0]))
    axes.set_ylim(len(trace.lake), 0)
    axes.set_aspect("equal")
    axes.axis("off")
    ends = {"goal": "goal reached", "hole": "ends in a hole", "time": "out of time"}
    axes.set_title(
        f"Round {trace.iteration}: {len(trace.actions)} steps, {ends[trace.outcome]}",
        loc="left",
        fontsize=11,
        fontweight="bold",
        color=INK,
    )


def comparison(path: Path, runs: Sequence[Run]) -> None:
    """Draw the learning curves of every method with the range over seeds, and the evaluations."""
    figure = _figure(11, 5)
    grid = figure.add_gridspec(1, 2, width_ratios=[2.2, 1])
    curves, ends = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    methods = list(dict.fromkeys(run.method for run in runs))
    count = len({run.seed for run in runs})
    _style(curves, f"Success in training: mean and range of {count} seeds", x="round", y="success")
    _style(ends, "Evaluation after training")
    for place, method in enumerate(methods):
        chosen = [run for run in runs if run.method == method]
        rounds = [report.iteration for report in chosen[0].reports]
        success = np.array([_smooth([r.success for r in run.reports]) for run in chosen])
        colour = COLOURS[method]
        curves.fill_between(rounds, success.min(0), success.max(0), color=colour, alpha=0.16, lw=0)
        curves.plot(rounds, success.mean(0), color=colour, linewidth=2.4, label=method)
        after = [run.after.sampled for run in chosen]
        ends.bar(place, float(np.mean(after)), width=0.6, color=colour, alpha=0.35)
        # Side by side, so that equal seeds do not hide each other.
        places = place + np.linspace(-0.12, 0.12, len(after)) if len(after) > 1 else [place]
        ends.plot(places, after, "o", color=colour, markersize=7)
    before = float(np.mean([run.before.sampled for run in runs]))
    ends.axhline(before, color=INK, linewidth=1, linestyle="--")
    ends.annotate(
        f"before: {before:.1%}",
        (len(methods) - 0.52, before),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=INK,
    )
    ends.set_xticks(range(len(methods)), methods)
    ends.set_xlim(-0.5, len(methods) - 0.5)
    _percent(curves)
    _percent(ends)
    curves.legend(loc="upper left", frameon=False)
    figure.savefig(path, dpi=DPI)
