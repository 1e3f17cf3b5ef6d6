"""Turn the JSON of a benchmark run into a table, plots and a verdict on the targets.

``python -m benchmarks.report results/cpu.json`` writes ``cpu.md``, ``cpu_speed.png`` and
``cpu_growth.png`` next to it. The exit code is 1 if a target is missed or was not measured.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

ROWS, TURNS = "rows 512x512", "turns 64x8192"
_NAMES = {
    "policy_loss": "steppo_loss, forward + backward",
    "token_gae": "step_gae per token",
    "step_gae": "step_gae per step",
    "segment": "StepLayout",
    "value_loss": "step_value_loss, forward + backward",
    "broadcast": "broadcast_to_tokens, forward + backward",
}
# The variant that the others of a suite are divided by.
_OURS = {"policy_loss": "fused, layout"}


@dataclass(frozen=True)
class Line:
    """A variant of a case at a number of threads, over all turns."""

    suite: str
    case: str
    variant: str
    threads: int
    seconds: dict[int, float]  # by turn
    info: list[dict[str, Any]]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds.values())

    def over_turns(self, key: str) -> float | None:
        """Return the median of an entry of `info`, None where it was not measured."""
        found = [info[key] for info in self.info if key in info]
        return statistics.median(found) if found else None


@dataclass(frozen=True)
class Target:
    """One promise and what was measured; None is "not measured"."""

    name: str
    wanted: str
    measured: float | None
    met: bool | None
    unit: str

    @property
    def verdict(self) -> str:
        """In one word."""
        return {True: "met", False: "MISSED", None: "not measured"}[self.met]

    @property
    def text(self) -> str:
        """What was measured."""
        return "-" if self.measured is None else f"{digits(self.measured)}{self.unit}"


class Results:
    """The lines of a run, by (suite, case, variant, threads); the growth apart."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.machine: dict[str, Any] = document["machine_info"]
        self.lines: dict[tuple[str, str, str, int], Line] = {}
        self.growth: dict[tuple[str, str], dict[int, Line]] = {}
        for entry in document["benchmarks"]:
            info = entry["extra_info"]
            key = info["suite"], info["case"], info["variant"], info["threads"]
            if info.get("growth"):
                curve = self.growth.setdefault((info["suite"], info["variant"]), {})
                line = curve.setdefault(info["tokens"], Line(*key, {}, []))
            else:
                line = self.lines.setdefault(key, Line(*key, {}, []))
            line.seconds[info["turn"]] = entry["stats"]["median"]
            line.info.append(info)

    @property
    def threads(self) -> int:
        """What torch uses unless told otherwise."""
        return int(self.machine["threads"])

    @property
    def sizes(self) -> list[int]:
        """The numbers of tokens of the growth curves."""
        return sorted({size for curve in self.growth.values() for size in curve})

    def get(self, suite: str, case: str, variant: str, threads: int | None = None) -> Line | None:
        """Return a line, or None if it was not measured."""
        return self.lines.get((suite, case, variant, threads or self.threads))

    def ratio(self, line: Line | None, ours: Line | None) -> float | None:
        """Return how many times longer `line` takes than `ours`: the median over common turns."""
        if line is None or ours is None:
            return None
        turns = line.seconds.keys() & ours.seconds.keys()
        ratios = [line.seconds[turn] / ours.seconds[turn] for turn in turns]
        return statistics.median(ratios) if ratios else None

    def slope(self, suite: str, variant: str) -> float | None:
        """Return d log seconds / d log tokens by least squares.

        The constant cost of a call lowers it, leaving the caches raises it.
        """
        points = [
            (math.log(tokens), math.log(line.median))
            for tokens, line in self.growth.get((suite, variant), {}).items()
        ]
        if len(points) < 3:
            return None
        return statistics.linear_regression(*zip(*points, strict=True)).slope


def targets(results: Results) -> list[Target]:
    """Return every promise with its verdict."""
    found: list[Target] = []

    def add(
        name: str, wanted: str, measured: float | None, holds: Callable[[float], bool],
        unit: str = "x",
    ) -> None:  # fmt: skip
        met = None if measured is None else holds(measured)
        found.append(Target(name, wanted, measured, met, unit))

    def faster(suite: str, case: str, peer: str, factor: float, ours: str, label: str) -> None:
        ratio = results.ratio(results.get(suite, case, peer), results.get(suite, case, ours))
        add(f"{label}: faster than {peer}", f">= {factor:g}x", ratio, lambda value: value >= factor)

    for case in (ROWS, TURNS):
        label = f"steppo_loss, {case}"
        faster("policy_loss", case, "eager", 15, "fused, layout", label)
        faster("policy_loss", case, "torch.compile", 4, "fused, layout", label)
        if case == ROWS and results.machine["verl"]:
            faster("policy_loss", case, "verl gspo", 10, "fused, layout", label)
        for variant in ("fused, layout", "fused, mask"):
            line = results.get("policy_loss", case, variant)
            # The mask form has to touch less: its share stands in the table.
            if variant == "fused, layout":
                add(
                    f"{label}: share of copy bandwidth",
                    ">= 40 %",
                    None if line is None else 100 * (line.over_turns("copy_fraction") or 0.0),
                    lambda value: value >= 40,
                    " %",
                )
            memory = None if line is None else line.over_turns("extra_bytes_per_token")
            add(
                f"{label}, {variant}: peak extra memory",
                # What is kept per step comes on top: less than a hundredth of a value.
                "<= 2 fp32 a token",
                None if memory is None else memory / 4,
                lambda value: value <= 2.01,
                " fp32 a token",
            )
    faster("token_gae", "tokens 64x8192", "verl loop", 200, "fused", "token GAE, 64x8192")
    single = results.get("token_gae", "tokens 64x8192", "fused", 1)
    add(
        "token GAE, 64x8192, one thread: cost of a token",
        "<= 3 ns",
        None if single is None else single.over_turns("ns_per_token"),
        lambda value: value <= 3,
        " ns",
    )
    faster("step_gae", "rows 2688x512", "authors' tables", 5, "fused", "step GAE, 2688x512")
    for suite, variant in (
        ("policy_loss", "fused, layout"),
        ("policy_loss", "fused, mask"),
        ("token_gae", "fused"),
        ("segment", "fused"),
    ):
        add(
            f"{_NAMES[suite].split(',')[0]}, {variant}: exponent of the growth with tokens",
            "<= 1.1",
            results.slope(suite, variant),
            lambda value: value <= 1.1,
            "",
        )
    return found


def headline(results: Results) -> str:
    """Return the machine and the date in a line."""
    machine = results.machine
    peer = f", verl {machine['verl']}" if machine["verl"] else ""
    copies = [
        f"{statistics.median(speeds):.1f} GB/s on {count} thread{'s' * (count > 1)}"
        for count in dict.fromkeys((results.threads, 1))
        if (
            speeds := [
                info["copy_gbps"]
                for line in results.lines.values()
                if line.threads == count
                for info in line.info
                if "copy_gbps" in info
            ]
        )
    ]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}; torch {machine['torch']}, "
        f"steppo_kernels {machine['steppo_kernels']}{peer}; {machine['date']}, load before "
        f"{machine['load']}; copy of 256 MB: {', '.join(copies)}"
    )


def digits(value: float) -> str:
    """Return a number with three digits, or all before the point."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def time_text(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


_NOTE = (
    "Medians over interleaved turns. GB/s counts the bytes that the task must move at least, not "
    "what a variant moves. % of copy compares with `torch.Tensor.copy_` of 256 MB in the same "
    "process (read + write), % same size with a copy that moves as many bytes as the case: inputs "
    "that fit the last-level cache can move faster than memory does. fp32 a token is the peak of "
    "torch's allocations above the inputs, the returned gradient included, in fp32 values."
)
COLUMNS = (
    "variant", "threads", "median", "ns/token", "first is faster by", "GB/s", "% of copy",
    "% same size", "fp32 a token",
)  # fmt: skip


def sections(results: Results) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Return a title and rows in the order of `COLUMNS` for each suite and case."""
    tables: dict[str, list[tuple[str, ...]]] = {}

    def number(value: float | None) -> str:
        return "" if value is None else digits(value)

    for line in results.lines.values():
        ours = results.get(line.suite, line.case, _OURS.get(line.suite, "fused"), line.threads)
        ratio = None if line is ours else results.ratio(line, ours)
        fraction, gbps = line.over_turns("copy_fraction"), line.over_turns("gbps")
        same_size = line.over_turns("copy_gbps_same_size")
        memory = line.over_turns("extra_bytes_per_token")
        tables.setdefault(f"{_NAMES[line.suite]}: {line.case}", []).append(
            (
                line.variant,
                str(line.threads),
                time_text(line.median),
                number(line.over_turns("ns_per_token")),
                "" if ratio is None else f"{digits(ratio)}x",
                number(gbps),
                "" if fraction is None else f"{100 * fraction:.0f} %",
                "" if not (gbps and same_size) else f"{100 * gbps / same_size:.0f} %",
                "" if memory is None else f"{memory / 4:.2f}",
            )
        )
    return list(tables.items())


def growth_rows(results: Results) -> list[tuple[str, ...]]:
    """Return for each curve its exponent and its ns/token by size."""
    rows = []
    for (suite, variant), curve in results.growth.items():
        slope = results.slope(suite, variant)
        rows.append(
            (
                f"{_NAMES[suite].split(',')[0]}, {variant}",
                "" if slope is None else f"{slope:.2f}",
                *(
                    digits(line.over_turns("ns_per_token") or math.nan)
                    for _, line in sorted(curve.items())
                ),
            )
        )
    return rows


def resident(results: Results) -> str:
    """Return what the largest batch adds to resident memory, in a sentence."""
    parts = [
        f"{variant} {line.over_turns('resident_bytes_per_token'):.1f}"
        for (suite, variant), curve in results.growth.items()
        if suite == "policy_loss"
        for line in [curve[max(curve)]]
        if line.over_turns("resident_bytes_per_token") is not None
    ]
    if not parts:
        return ""
    return (
        "Growth of resident memory over one forward + backward at the largest size, bytes a token "
        f"(8 are 2 fp32 values): {'; '.join(parts)}."
    )


def markdown(results: Results, verdicts: list[Target], name: str) -> str:
    """Return the report as a page."""
    lines = [f"# {name}", "", headline(results), ""]

    def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        lines.append("| " + " | ".join(header) + " |")
        lines.append("|" + "---|" * len(header))
        lines.extend("| " + " | ".join(row) + " |" for row in rows)
        lines.append("")

    table(
        ("target", "wanted", "measured", "verdict"),
        [(t.name, t.wanted, t.text, t.verdict) for t in verdicts],
    )
    lines += [f"![Times of the variants]({name}_speed.png)", ""]
    for title, rows in sections(results):
        lines += [f"## {title}", ""]
        table(COLUMNS, rows)
    if results.growth:
        sizes = results.sizes
        lines += ["## Growth: ns/token by number of tokens", ""]
        table(("curve", "exponent", *(f"{size:.0e}" for size in sizes)), growth_rows(results))
        lines += [resident(results), "", f"![Cost against tokens]({name}_growth.png)", ""]
    return "\n".join(lines) + f"\n{_NOTE}\n"


def show(results: Results, verdicts: list[Target], name: str) -> None:
    """Print the report."""
    console = Console(width=None if sys.stdout.isatty() else 132)
    console.print(f"[bold]{name}[/bold]: {headline(results)}\n", highlight=False)
    for title, rows in sections(results):
        table = Table(title=title, title_justify="left", title_style="bold")
        for k, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if k == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if results.growth:
        table = Table(title="ns/token by number of tokens", title_justify="left")
        sizes = results.sizes
        for column in ("curve", "exponent", *(f"{size:.0e}" for size in sizes)):
            table.add_column(column, justify="left" if column == "curve" else "right")
        for row in growth_rows(results):
            table.add_row(*row)
        console.print(table)
        console.print(resident(results), highlight=False)
    table = Table(title="targets", title_justify="left", title_style="bold")
    for column in ("target", "wanted", "measured", "verdict"):
        table.add_column(column)
    colors = {True: "green", False: "red", None: "yellow"}
    for target in verdicts:
        color = colors[target.met]
        table.add_row(
            target.name, target.wanted, target.text, f"[{color}]{target.verdict}[/{color}]"
        )
    console.print(table)


_COLORS = {
    "fused, layout": "#0b6e4f", "fused": "#0b6e4f", "fused, mask": "#54a98b",
    "fused, per token": "#54a98b", "fused, layout + per token": "#9ccdb9", "eager": "#c0504d",
    "torch.compile": "#e0a030", "verl gspo": "#7a5ea8", "verl loop": "#7a5ea8",
    "authors' tables": "#4a78b5",
}  # fmt: skip
_CURVES = {
    ("policy_loss", "fused, layout"): ("steppo_loss, layout", "#0b6e4f", "o"),
    ("policy_loss", "fused, mask"): ("steppo_loss, mask", "#54a98b", "s"),
    ("policy_loss", "eager"): ("the same in eager PyTorch", "#c0504d", "^"),
    ("token_gae", "fused"): ("step_gae, a step a token", "#4a78b5", "D"),
    ("segment", "fused"): ("StepLayout.from_mask", "#e0a030", "v"),
}
_STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "figure.facecolor": "white",
}  # fmt: skip


def plot_speed(results: Results, path: Path) -> None:
    """Draw the times of the variants, a panel a case."""
    cases = [
        ("policy_loss", ROWS, "steppo_loss, one row per step\n[512, 512]"),
        ("policy_loss", TURNS, "steppo_loss, multi-turn\n[64, 8192], 24 % action tokens"),
        ("token_gae", "tokens 64x8192", "token-level GAE\n[64, 8192]"),
        ("step_gae", "rows 2688x512", "step GAE from rows\n[2688, 512]"),
    ]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        axes = figure.subplots(2, 2)
        for axis, (suite, case, title) in zip(axes.flat, cases, strict=True):
            lines = [
                line
                for (name, of, _, threads), line in results.lines.items()
                if (name, of, threads) == (suite, case, results.threads)
            ]
            ours = results.get(suite, case, _OURS.get(suite, "fused"))
            seconds = [line.median for line in lines]
            names = [line.variant for line in lines]
            axis.barh(names, seconds, color=[_COLORS.get(n, "#888888") for n in names], height=0.7)
            for k, line in enumerate(lines):
                ratio = results.ratio(line, ours)
                factor = "" if ratio is None or line is ours else f"   {digits(ratio)}x"
                axis.text(line.median * 1.08, k, time_text(line.median) + factor, va="center")
            axis.set_xscale("log")
            if seconds:
                axis.set_xlim(min(seconds) / 2, max(seconds) * 12)
            # Bars of one height in all panels, the first on top.
            axis.set_ylim(4.6, -0.6)
            axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="x", color="#e5e5e5")
            axis.set_xlabel("seconds (log scale)")
        figure.suptitle(
            f"Times, and how often the first fits into them. {_caption(results)}",
            fontsize=8.5, color="#555555", x=0.01, ha="left",
        )  # fmt: skip
        figure.savefig(path, dpi=150)


def plot_growth(results: Results, path: Path) -> None:
    """Draw time and time per token against tokens."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        total, each = figure.subplots(1, 2)
        for key, (label, color, marker) in _CURVES.items():
            curve = sorted(results.growth.get(key, {}).items())
            if not curve:
                continue
            tokens = [size for size, _ in curve]
            seconds = [line.median for _, line in curve]
            slope = results.slope(*key)
            exponent = "" if slope is None else f": tokens$^{{{slope:.2f}}}$"
            style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.6}
            total.plot(tokens, [1e3 * s for s in seconds], label=label + exponent, **style)
            each.plot(tokens, [1e9 * s / n for s, n in zip(seconds, tokens, strict=True)], **style)
        for axis, title in ((total, "milliseconds"), (each, "nanoseconds per token")):
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xlabel("tokens")
            axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
            axis.grid(color="#e5e5e5")
        if total.get_lines():
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        figure.suptitle(
            _caption(results), fontsize=8.5, color="#555555", x=0.01, ha="left",
        )  # fmt: skip
        figure.savefig(path, dpi=150)


def _caption(results: Results) -> str:
    machine = results.machine
    return (
        f"{machine['cpu']}, {results.threads} threads, torch {machine['torch']}, "
        f"{machine['date']}; fp32, medians"
    )


def compact(document: dict[str, Any]) -> str:
    """Return the JSON with a line for each entry."""
    rest = {key: value for key, value in document.items() if key != "benchmarks"}
    entries = ",\n".join(json.dumps(entry) for entry in document["benchmarks"])
    return f'{json.dumps(rest)[:-1]}, "benchmarks": [\n{entries}\n]}}\n'


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("json", type=Path, help="what --benchmark-json of pytest wrote")
    path: Path = parser.parse_args(arguments).json
    document = json.loads(path.read_text())
    path.write_text(compact(document))
    results = Results(document)
    verdicts = targets(results)
    path.with_suffix(".md").write_text(markdown(results, verdicts, path.stem))
    plot_speed(results, path.with_name(f"{path.stem}_speed.png"))
    plot_growth(results, path.with_name(f"{path.stem}_growth.png"))
    show(results, verdicts, path.stem)
    missed = [target.name for target in verdicts if not target.met]
    for name in missed:
        print(f"not met: {name}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
