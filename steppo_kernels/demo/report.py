"""What a demo leaves behind: tables, pictures and the comparison as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table

from . import figures
from .results import Run
from .train import IterationReport, TrainConfig

# What an action of the MDP is.
ACTIONS = {
    "StepPO": "a turn",
    "PPO": "a token",
    "GSPO": "the whole trajectory",
}


def write(out_dir: Path, runs: Sequence[Run], config: TrainConfig) -> list[Path]:
    """Write every file and return the paths; the comparison only where there is one."""
    first = runs[0]
    files = [out_dir / "learning_curve.png", out_dir / "trajectory.png"]
    figures.learning_curve(files[0], first)
    assert first.trace is not None
    figures.trajectory(files[1], first.trace)
    if len({run.method for run in runs}) > 1:
        files += [out_dir / "comparison.png", out_dir / "comparison.md"]
        figures.comparison(files[2], runs)
        files[3].write_text(comparison_markdown(runs, config), encoding="utf-8")
    return files


def show(console: Console, runs: Sequence[Run], files: Sequence[Path], seconds: float) -> None:
    """Print the rounds of the first run, the evaluations, and where the files lie."""
    console.print(_rounds(runs[0]))
    console.print(_evaluations(runs))
    for file in files:
        console.print(f"wrote {file}", highlight=False, soft_wrap=True)
    console.print(f"{seconds:.0f} s in all", highlight=False)


def _rounds(run: Run) -> Table:
    table = Table(title=f"{run.method}, seed {run.seed}: the rounds", title_justify="left")
    for name in (
        "round",
        "success",
        "turns",
        "policy loss",
        "value loss",
        "clipped",
        "approx. KL",
        "tok/s",
    ):
        table.add_column(name, justify="right")
    every = max(1, len(run.reports) // 8)
    for report in run.reports:
        if report.iteration == 1 or report.iteration % every == 0:
            table.add_row(*_round_cells(report))
    return table


def _round_cells(report: IterationReport) -> list[str]:
    metrics = report.metrics
    return [
        str(report.iteration),
        f"{report.success:.0%}",
        f"{report.turns:.1f}",
        f"{metrics['policy_loss']:+.4f}",
        f"{metrics['value_loss']:.4f}",
        f"{metrics['clip_fraction']:.1%}",
        f"{metrics['approx_kl']:.4f}",
        f"{report.tokens_per_second:,.0f}",
    ]


def _evaluations(runs: Sequence[Run]) -> Table:
    episodes = runs[0].after.episodes
    table = Table(title=f"Success over {episodes} evaluation episodes", title_justify="left")
    for name in ("method", "seed"):
        table.add_column(name)
    for name in ("before", "after", "after, greedy", "turns", "malformed", "seconds"):
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(
            run.method,
            str(run.seed),
            f"{run.before.sampled:.1%}",
            f"[bold]{run.after.sampled:.1%}[/]",
            f"{run.after.greedy:.1%}",
            f"{run.after.turns:.1f}",
            f"{run.after.malformed:.1%}",
            f"{run.seconds:.0f}",
        )
    return table


def comparison_markdown(runs: Sequence[Run], config: TrainConfig) -> str:
    """Return the comparison as a Markdown document.

    Args:
        runs: the same seeds for every method.
        config: hyper-parameters they shared.
    """
    seeds = sorted({run.seed for run in runs})
    lines = [
        "# StepPO, PPO and GSPO on FrozenLake told in words",
        "",
        f"Seeds {', '.join(map(str, seeds))}. For each seed the three methods start from the same "
        "warmed-up agent and get",
        f"the same budget: {config.iterations} rounds of {config.episodes} episodes, each with "
        f"{config.epochs} x {config.minibatches} optimizer steps. Only the layout",
        "differs, for the advantages as for the loss. GSPO here is its sequence-level ratio with a "
        "critic's baseline, not with groups.",
        "",
        f"The hyper-parameters are the same too: learning rate {config.learning_rate:g}, gamma "
        f"{config.gamma:g}, lambda {config.lam:g}, clip {config.clip:g}, KL",
        f"coefficient {config.kl_coef:g}. The defaults were chosen on runs of StepPO with seeds 0 "
        "to 4 and not tuned for the other two.",
        "Gamma and lambda count actions, so token by token they discount and forget faster; the "
        "clip bounds a mean log-ratio over one action.",
        "",
        f"Success is measured on {runs[0].after.episodes} episodes with sampled actions. "
        '"Training" is the mean success of all rounds,',
        "an area under the learning curve. Spread is the standard deviation over seeds.",
        "",
        "| method | an action is | before | after | each seed | after, greedy | training |",
        "|---|---|---:|---:|---|---:|---:|",
    ]
    for method in dict.fromkeys(run.method for run in runs):
        chosen = [run for run in runs if run.method == method]
        curve = [mean(report.success for report in run.reports) for run in chosen]
        cells = [
            method,
            ACTIONS[method],
            _spread([run.before.sampled for run in chosen]),
            _spread([run.after.sampled for run in chosen]),
            ", ".join(f"{run.after.sampled:.1%}" for run in chosen),
            _spread([run.after.greedy for run in chosen]),
            _spread(curve),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "![Success in training](comparison.png)", ""]
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1%}"
    return f"{mean(values):.1%} ± {100 * stdev(values):.1f}"
