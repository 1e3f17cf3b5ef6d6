"""The plot of the weak-scaling run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..report.plots import STYLE, head, top_line

# What is split over the ranks, as the plot says it.
TITLES = {
    "data": "over the batch\n(normalizer, metrics)",
    "vocabulary": "over the vocabulary\n(tensor parallel)",
    "tokens": "over the tokens of a step\n(context parallel)",
}


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw the times of all turns by the number of processes, beside the time of one."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6))
        axes = figure.subplots(1, len(TITLES), sharey=True)
        for axis, (way, title) in zip(axes, TITLES.items(), strict=True):
            numbers = document["ways"][way]
            for place, (size, times) in enumerate(document["seconds"][way].items()):
                axis.plot([place] * len(times), times, "o", ms=3, color="#999999", alpha=0.6)
                median = numbers["seconds"][size]
                axis.plot([place - 0.25, place + 0.25], [median] * 2, color="#1f77b4", lw=2.5)
            axis.axhline(numbers["seconds"]["1"], color="#cccccc", ls=":", zorder=0)
            head(axis, title)
            axis.set_xticks(range(len(numbers["seconds"])), numbers["seconds"])
            axis.set_xlim(-0.6, len(numbers["seconds"]) - 0.4)
            axis.set_xlabel(f"processes; efficiency {numbers['efficiency']:.0%}")
        axes[0].set_ylabel("seconds, forward + backward")
        axes[0].set_ylim(bottom=0)
        info = document["machine"]
        top_line(
            figure,
            f"the same work for each process: {document['work of a rank']}; {info['cpu']}, a "
            f"thread each, {info['date']}",
        )
        figure.tight_layout(rect=(0, 0, 1, 0.96))
        figure.savefig(path, dpi=110)
