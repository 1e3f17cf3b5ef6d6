"""The commands of ``steppo-kernels``."""

from __future__ import annotations

import importlib
import json
import secrets
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import torch
import typer
from rich.console import Console
from rich.markup import escape

from .. import __version__
from ..backends import choice
from . import info as info_facts
from . import report

main = typer.Typer(
    name="steppo-kernels",
    help="Step-level policy optimization (StepPO) kernels: what runs here, is it right and fast?",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)

# In a pipe or a log no width is known, and tables folded to 80 columns cannot be read.
_LOG_WIDTH = 160

_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    return console


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"steppo-kernels {__version__}")
        raise typer.Exit


@main.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    try:
        choice.why_not_cpu()
    except ValueError as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from None


@main.command()
def info(as_json: _AsJson = False) -> None:
    """Show versions, devices, and which backends run here, or why not."""
    facts = info_facts.collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        info_facts.show(facts, _console())


@main.command()
def validate(
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the batches. The default is a fresh one, which is shown."),
    ] = None,
    batches: Annotated[
        int, typer.Option(min=1, help="Random batches per case; every 8 have all kinds of them.")
    ] = 8,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Check this one; repeat for more. Every one that runs, by default."),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="Like cpu or cuda:0; repeat for more. CPU and first GPU, by default."),
    ] = None,
    operation: Annotated[
        list[str] | None,
        typer.Option(help="Only operations whose name contains this; repeat for more."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Only inputs of this, like bfloat16; repeat for more."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=1.0, help="Begin no more after this time; some of every operation comes first."
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show each way an operation was called.")
    ] = False,
    as_json: _AsJson = False,
) -> None:
    """Check every operation, backend and dtype against the fp64 reference.

    Each is run on fresh random batches. A backend may err twice as far as plain PyTorch does in
    the same dtype, and a few roundings more. It must give the same bits when it runs again, and
    nothing of a masked token may reach a result. Exits with 1 if anything is missed. What there was
    no time for within --seconds is counted, and is no miss.
    """
    from . import validate as validation

    seed = secrets.randbelow(2**31) if seed is None else seed
    cases = _chosen(validation.CASES, operation)
    known_dtypes = {str(kind).removeprefix("torch."): kind for kind in validation.DTYPES}
    for name in dtype or []:
        if name not in known_dtypes:
            raise typer.BadParameter(
                f"got {name!r}, expected one of {', '.join(known_dtypes)}", param_hint="--dtype"
            )
    chosen = _targets(backend or [], device or [])
    start = time.monotonic()
    rows: list[validation.Row] = []
    late: list[int] = []
    with _console(stderr=True).status("") as status:
        for place, (where, names) in enumerate(chosen.items()):
            left = None if seconds is None else seconds - (time.monotonic() - start)
            rows += validation.validate(
                cases,
                names,
                where,
                seed=seed,
                batches=batches,
                dtypes=[known_dtypes[name] for name in dtype or known_dtypes],
                seconds=None if left is None else left / (len(chosen) - place),
                on_case=lambda name: status.update(escape(name)),
                on_late=late.append,
            )
    not_begun = None if seconds is None else sum(late)
    shown = rows if verbose else validation.widest(rows)
    if as_json:
        typer.echo(
            json.dumps(report.as_json(shown, seed, batches, not_begun), indent=2, allow_nan=False)
        )
    else:
        report.show(shown, rows, seed, _console(), verbose=verbose, not_begun=not_begun)
    if not all(row.ok for row in rows):
        raise typer.Exit(1)


@main.command()
def bench(
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Time this one; repeat for more. Every one that runs, by default."),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="Like cpu or cuda:0; repeat for more. CPU and first GPU, by default."),
    ] = None,
    operation: Annotated[
        list[str] | None,
        typer.Option(help="Only operations whose name contains this; repeat for more."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1.0, help="How long it may take, for all devices together.")
    ] = 48.0,
    as_json: _AsJson = False,
) -> None:
    """Time every function and backend next to plain PyTorch and torch.compile.

    The variants of a call take turns, and each has to give the right answer before. What has no
    time in a short budget is left out and says so. Exits with 1 if a variant is wrong or fails.
    """
    from . import bench as benchmark

    start, date = time.monotonic(), datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    load = info_facts.load()
    cases = _chosen(benchmark.CASES, operation)
    chosen = {
        where: names for where, names in _targets(backend or [], device or []).items() if names
    }
    left_out = {name: benchmark.without_meaning(name) for where in chosen for name in chosen[where]}
    for name in backend or []:
        if why := left_out.get(name):
            raise typer.BadParameter(why, param_hint="--backend")
    rows: list[benchmark.Row] = []
    with _console(stderr=True).status("") as status:
        for place, (where, names) in enumerate(chosen.items()):
            left = seconds - (time.monotonic() - start)
            rows += benchmark.bench(
                cases,
                [name for name in names if not left_out[name]],
                where,
                seconds=left / (len(chosen) - place),
                on_case=lambda name: status.update(escape(name)),
            )
    found = benchmark.Report(
        date=date,
        load=load,
        seconds=seconds,
        took=time.monotonic() - start,
        left_out=[why for why in left_out.values() if why],
        rows=rows,
    )
    if as_json:
        typer.echo(json.dumps(benchmark.as_json(found), indent=2, allow_nan=False))
    else:
        benchmark.show(found, _console())
    if not found.ok:
        raise typer.Exit(1)


@main.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for what the demo writes.")] = Path("demo_out"),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Number of runs of --compare, from --seed on; 3 by default."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also train by token and by trajectory.")
    ] = False,
    backend: Annotated[str, typer.Option(help="Backend of the kernels.")] = "auto",
) -> None:
    """Train a small agent with StepPO, from nothing to finished pictures."""
    _known_backend(backend)
    if why := backend != "auto" and choice.unavailable(backend, torch.device("cpu")):
        raise typer.BadParameter(f"{backend!r} does not run here: {why}", param_hint="--backend")
    if seeds is not None and not compare:
        raise typer.BadParameter(
            "got it without --compare, which it counts the runs of", param_hint="--seeds"
        )
    try:
        run_demo = importlib.import_module("steppo_kernels.demo").run_demo
        run_demo(out_dir=out, seed=seed, backend=backend, compare=compare, seeds=seeds or 3)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise typer.BadParameter(
            f"got {str(out)!r}: {error.strerror}", param_hint="--out"
        ) from error
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "steppo_kernels"):
            raise
        typer.secho(
            f"The demo needs the package {package}: pip install '.[demo]' in a clone",
            fg=typer.colors.RED,
            err=True,
        )
        raise typer.Exit(1) from None


class _Case(Protocol):
    @property
    def operation(self) -> str: ...


_AnyCase = TypeVar("_AnyCase", bound=_Case)


def _chosen(cases: Sequence[_AnyCase], parts: list[str] | None) -> list[_AnyCase]:
    """Return the cases of operations whose name contains one of `parts`, or all without any.

    Raises:
        typer.BadParameter: there are none.
    """
    found = [case for case in cases if not parts or any(part in case.operation for part in parts)]
    if not found:
        known = ", ".join(dict.fromkeys(case.operation for case in cases))
        raise typer.BadParameter(
            f"got {', '.join(map(repr, parts or []))}, expected part of one of: {known}",
            param_hint="--operation",
        )
    return found


def _known_backend(name: str) -> str:
    if name not in choice.BACKENDS:
        raise typer.BadParameter(
            f"got {name!r}, expected one of {', '.join(choice.BACKENDS)}",
            param_hint="--backend",
        )
    return name


def _targets(names: list[str], devices: list[str]) -> dict[torch.device, list[str]]:
    """Return the backends to run on each device.

    Raises:
        typer.BadParameter: something asked for is unknown or does not run here.
    """
    seen = info_facts.torch_devices()
    wanted = [_device(text, seen) for text in dict.fromkeys(devices)] or seen[:2]
    for name in names:
        if name == "auto":
            raise typer.BadParameter(
                "'auto' is not an implementation; it picks one", param_hint="--backend"
            )
        _known_backend(name)
        reasons = [choice.unavailable(name, where) for where in wanted]
        if all(reasons):
            raise typer.BadParameter(
                f"{name!r} does not run here: {reasons[-1]}", param_hint="--backend"
            )
    asked = list(dict.fromkeys(names)) or [n for n in choice.BACKENDS if n != "auto"]
    return {
        where: [name for name in asked if choice.unavailable(name, where) is None]
        for where in wanted
    }


def _device(text: str, seen: list[torch.device]) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device == torch.device("cuda"):
        device = torch.device("cuda", 0)
    if device is None or device not in seen:
        raise typer.BadParameter(
            f"got {text!r}, expected one of {', '.join(map(str, seen))}", param_hint="--device"
        )
    return device
