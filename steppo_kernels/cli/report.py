"""What `validate` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import __version__
from .validate import Row


def as_json(
    rows: Sequence[Row], seed: int, batches: int, not_begun: int | None = None
) -> dict[str, Any]:
    """Return the rows as JSON can hold them: a number that is not finite becomes null.

    Args:
        rows: the verdicts.
        seed: of the batches.
        batches: of each case in each dtype.
        not_begun: how many combinations there was no time for; None if there was no limit.
    """
    return {
        "version": __version__,
        "seed": seed,
        "batches": batches,
        **({} if not_begun is None else {"not_begun": not_begun}),
        "ok": all(row.ok for row in rows),
        "rows": [
            {
                **{name: _finite(value) for name, value in asdict(row).items()},
                "ok": row.ok,
            }
            for row in rows
        ],
    }


def show(
    shown: Sequence[Row],
    rows: Sequence[Row],
    seed: int,
    console: Console,
    *,
    verbose: bool,
    not_begun: int | None = None,
) -> None:
    """Print a table a device, then what was missed.

    Args:
        shown: the lines of the tables.
        rows: everything that was checked.
        seed: of the batches.
        console: where to.
        verbose: the tables already hold everything.
        not_begun: how many combinations there was no time for.
    """
    for device in dict.fromkeys(row.device for row in shown):
        table = Table(
            title=f"{device}: largest relative error against the fp64 reference, seed {seed}",
            title_justify="left",
        )
        for name in ("operation", "backend", "dtype"):
            table.add_column(name, no_wrap=True)
        for name in ("error", "plain PyTorch", "bound"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        table.add_column("of" if verbose else "nearest to its bound", overflow="fold")
        before = ""
        for row in (row for row in shown if row.device == device):
            if before not in ("", row.operation):
                table.add_section()
            before = row.operation
            table.add_row(*_cells(row))
        console.print(table)
    _summarize(shown, rows, seed, console, not_begun or 0)


def _cells(row: Row) -> tuple[str, ...]:
    where = ": ".join(part for part in (row.variant, row.output) if part)
    if _no_number(row):
        where, numbers = row.variant, ("", "", "")
    elif not row.dtype:
        # Layouts are integers: nothing about them is approximate.
        where = row.variant if row.ok else where
        numbers = ("equal" if row.ok else "differs", "", "")
    else:
        plain = "" if row.plain is None else _number(row.plain)
        numbers = (_number(row.error), plain, _number(row.bound))
    verdict = "[green]ok[/]" if row.ok else "[bold red]MISS[/]"
    return row.operation, row.backend, row.dtype or "int", *numbers, verdict, escape(where)


def _summarize(
    shown: Sequence[Row], rows: Sequence[Row], seed: int, console: Console, not_begun: int
) -> None:
    missed = [row for row in rows if not row.ok]
    for row in (row for row in shown if not row.ok):
        output = "" if _no_number(row) else row.output
        names = (row.operation, row.variant, output, row.backend, row.device, row.dtype)
        where = ", ".join(name for name in names if name)
        console.print(f"[bold red]MISS[/] {escape(where)}: {escape(row.note)}", highlight=False)
    checked = {row.backend for row in rows}
    if checked == {"reference"}:
        console.print(
            "[yellow]No native backend was checked[/], only the reference in lower precision "
            "against itself in fp64. See: steppo-kernels info",
            highlight=False,
        )
    runs = sum(row.batches for row in rows)
    verdict = f"[bold red]{len(missed)} missed[/]" if missed else "[green]all ok[/]"
    if not_begun:
        verdict += f", [yellow]{not_begun} more not begun[/], as the time was up"
    console.print(
        f"{len(rows)} combinations of call, backend and dtype, {runs} batches: {verdict} "
        f"(--seed {seed} repeats this)",
        highlight=False,
    )


def _no_number(row: Row) -> bool:
    """Whether what is wrong is not the size of an error: a raise, other bits, a leak."""
    return not row.ok and row.error <= row.bound


def _number(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "inf"


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
