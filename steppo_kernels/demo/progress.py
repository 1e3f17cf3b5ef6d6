"""The progress bar with the metrics of the latest step."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live as Screen
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from .train import IterationReport


class Live:
    """A progress bar over the warm-up steps and rounds of a demo, with a line of metrics.

    Args:
        console: where to.
        total: warm-up steps and rounds altogether.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._metrics = Text(style="dim")
        self._task = self._progress.add_task("", total=total)
        # A line of its own: a terminal of 80 columns has no room for both.
        self._screen = Screen(Group(self._progress, self._metrics), console=console)

    def __enter__(self) -> Live:
        """Show the bar."""
        self._screen.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the bar as it is."""
        self._screen.stop()
        if not self._screen.console.is_terminal:
            # Into a file, only the last state is written, without its line break.
            self._screen.console.line()

    def begin(self, phase: str) -> None:
        """Name what runs from now on."""
        self._progress.update(self._task, description=phase)

    def warmup_step(self, loss: float) -> None:
        """Count a warm-up step."""
        self._progress.advance(self._task)
        self._metrics.plain = f"cross-entropy {loss:.3f}"

    def iteration(self, report: IterationReport) -> None:
        """Count a round."""
        metrics = report.metrics
        self._progress.advance(self._task)
        self._metrics.plain = (
            f"success {report.success:4.0%}  loss {metrics['loss']:+.3f}  "
            f"clipped {metrics['clip_fraction']:.0%}  KL {metrics['approx_kl']:.3f}  "
            f"{report.tokens_per_second:,.0f} tok/s"
        )
