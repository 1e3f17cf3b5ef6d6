"""Pages made of tables, paragraphs and plots, as Markdown and on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from .results import Results


@dataclass(frozen=True)
class Table:
    """A title and rows of text; the first column is the name of a row."""

    title: str
    header: Sequence[str]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Plot:
    """A picture, drawn into NAME_SUFFIX.png."""

    alt: str
    suffix: str
    draw: Callable[[Results, Path], None]

    def path(self, folder: Path, name: str) -> Path:
        """Return where the picture of a run lies."""
        return folder / f"{name}_{self.suffix}.png"


Block = Table | Plot | str


def digits(value: float) -> str:
    """Return a number with three digits, or all before the point."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def number(value: float | None, unit: str = "") -> str:
    """Return a number with its unit, or nothing where there is none."""
    return "" if value is None else f"{digits(value)}{unit}"


def time_text(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """Return a page."""
    lines = [f"# {title}", ""]
    for block in blocks:
        if isinstance(block, Plot):
            lines += [f"![{block.alt}]({title}_{block.suffix}.png)", ""]
        elif isinstance(block, str):
            lines += [block, ""] if block else []
        else:
            lines += [f"## {block.title}", ""] if block.title else []
            lines += ["| " + " | ".join(block.header) + " |", "|" + "---|" * len(block.header)]
            lines += ["| " + " | ".join(row) + " |" for row in block.rows]
            lines.append("")
    return "\n".join(lines)


def show(console: Console, blocks: Sequence[Block]) -> None:
    """Print the tables and paragraphs of a page; verdicts in color."""
    colors = {"met": "green", "MISSED": "red", "not measured": "yellow"}
    for block in blocks:
        if isinstance(block, str):
            console.print(block, highlight=False)
        elif isinstance(block, Table):
            table = RichTable(title=block.title or None, title_justify="left", title_style="bold")
            for k, column in enumerate(block.header):
                table.add_column(column, justify="left" if k == 0 else "right")
            for row in block.rows:
                table.add_row(
                    *(f"[{colors[text]}]{text}[/]" if text in colors else text for text in row)
                )
            console.print(table)
