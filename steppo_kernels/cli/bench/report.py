"""What `bench` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ... import __version__
from .. import info as info_facts
from .row import Row


@dataclass(frozen=True)
class Report:
    """Everything that a run found.

    Attributes:
        date: when, UTC.
        load: how many processes wanted a core before; None if nobody counts them.
        seconds: the budget.
        took: how many seconds it was.
        left_out: backends that run here but whose times mean nothing, a sentence each.
        rows: what was measured.
    """

    date: str
    load: float | None
    seconds: float
    took: float
    left_out: Sequence[str]
    rows: Sequence[Row]

    @property
    def ok(self) -> bool:
        """Whether no variant is wrong and none failed."""
        return not any(row.is_fault for row in self.rows)


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as JSON can hold it."""
    return {
        "version": __version__,
        "date": report.date,
        "load": report.load,
        "machine": info_facts.collect(),
        "seconds": report.seconds,
        "took": round(report.took, 1),
        "ok": report.ok,
        "left_out": list(report.left_out),
        "rows": [asdict(row) for row in report.rows],
    }


def show(report: Report, console: Console) -> None:
    """Print the machine, a table a device, and what the numbers are."""
    for line in info_facts.headline(info_facts.collect()):
        console.print(line, highlight=False)
    load = "" if report.load is None else f", load before {report.load}"
    console.print(f"{report.date}, {report.took:.0f} s{load}", highlight=False)
    for device in dict.fromkeys(row.device for row in report.rows):
        console.print(_table(device, [row for row in report.rows if row.device == device]))
    for line in (*_LEGEND, *_not_compiled(report.rows)):
        console.print(escape(line), highlight=False)
    for line in report.left_out:
        console.print(f"[yellow]{escape(line)}[/]", highlight=False)
    for row in report.rows:
        if row.is_fault:
            names = (row.operation, row.variant, row.size, row.implementation, row.device)
            where = escape(", ".join(name for name in names if name))
            verdict = f"[bold red]{row.status.upper()}[/]"
            console.print(f"{verdict} {where}: {escape(row.note)}", highlight=False)
    hasty = sum(row.status == "no time" for row in report.rows)
    if hasty:
        console.print(
            f"[yellow]{hasty} of {len(report.rows)} had no time[/]: --seconds gives more, and "
            "torch keeps what it has compiled for the next run",
            highlight=False,
        )


_LEGEND = (
    "ms: wall time of a call on warm caches, the median over turns that the variants take; +-: "
    "half of the range of its middle half.",
    "x eager: how many times as fast as the reference backend, which is plain PyTorch. GB/s: "
    "inputs read once and outputs written once.",
)


def _not_compiled(rows: Sequence[Row]) -> list[str]:
    """Return a line for each reason, with the operations that have it."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.status == "not compiled":
            reasons.setdefault(row.note, {})[row.operation] = None
    return [f"not compiled ({', '.join(names)}): {why}" for why, names in reasons.items()]


def _table(device: str, rows: Sequence[Row]) -> Table:
    on_gpu = any(row.device_ms is not None for row in rows)
    table = Table(title=device, title_justify="left")
    for name in ("operation", "call", "size", "variant"):
        table.add_column(name, no_wrap=True)
    numbers = ["ms", "+-", "x eager", "GB/s", *(["GPU ms", "peak MiB"] if on_gpu else [])]
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    before = ("", "", "")
    for row in rows:
        case = row.operation, row.variant, row.size
        if before[0] not in ("", case[0]):
            table.add_section()
        named = case if case != before else ("", "", "")
        before = case
        spread = None if row.iqr_ms is None else row.iqr_ms / 2
        cells = [_short(value) for value in (row.ms, spread, row.speedup, row.gb_per_s)]
        if on_gpu:
            cells += [_short(row.device_ms), _short(row.peak_mib)]
        color = "bold red" if row.is_fault else "yellow"
        status = "" if row.status == "ok" else f"[{color}]{row.status}[/]"
        table.add_row(*named, row.implementation, *cells, status)
    return table


def _short(value: float | None) -> str:
    """Return a number with three digits, or all of those before the point."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")
