"""Check the package on a GPU, and write what was found: ``python -m benchmarks.gpu``.

Every stage has a time limit, and one that fails does not keep the others from running. The exit
code is 1 if a stage failed or a target for this GPU is missed. `make gpu-check` runs this.

With ``--device cpu`` it is a dry run: everything but what needs a GPU, on tiny inputs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..report.page import Table, show
from .cases import GROUPS
from .facts import facts, headline, slug
from .order import last_measured
from .plan import STAGES, Options, phases
from .report import NAME, stages, verdicts, write
from .results import Results
from .running import Outcome, log_of, side_by_side

ROOT = Path(__file__).parents[2]
_WORK = ROOT / "build" / NAME


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda:0", help="a GPU, or cpu for a dry run")
    parser.add_argument("--out", type=Path, help="folder; default: benchmarks/results/<GPU>")
    parser.add_argument("--work", type=Path, default=_WORK, help="folder for the output of stages")
    parser.add_argument("--stages", default=",".join(STAGES), help="only these, with commas")
    parser.add_argument("--only", default="", help="part of the names of the cases to measure")
    parser.add_argument("--groups", default=",".join(GROUPS), help="of cases, with commas")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies every time limit")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device: got {given.device!r}, expected a GPU such as cuda:0, or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no GPU; a dry run takes --device cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    wanted, groups = tuple(given.stages.split(",")), tuple(given.groups.split(","))
    for option, names, known in (("stages", wanted, STAGES), ("groups", groups, GROUPS)):
        if unknown := [name for name in names if name not in known]:
            some = ", ".join(known)
            parser.error(f"--{option}: got {', '.join(unknown)}, expected some of {some}")
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    # What stops the check by a signal also ends what it has started.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    options = Options(device, given.work.resolve(), given.patience, wanted, given.only, groups)
    return run(options, given.out)


def run(options: Options, out: Path | None) -> int:
    """Run a check; return the exit code."""
    begin, found = time.monotonic(), facts(options.device)
    kept = ROOT / "benchmarks" / "results" / slug(found["device"])
    if out is None:
        out = options.work if options.is_dry else kept
    # The results of this run take the place of those before.
    options.measured.write_text(json.dumps(last_measured((kept, out), f"{NAME}.json")))
    print(headline(found), flush=True)
    outcomes: list[Outcome] = []
    results = Results({})
    failed_tests: list[dict[str, Any]] = []
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{NAME}.log").open("w") as log:
        for tasks in phases(options):
            outcomes += side_by_side(tasks, ROOT, options.work)
            if options.rows.exists():
                results = Results(json.loads(options.rows.read_text()))
            if options.counts.exists():
                failed_tests = json.loads(options.counts.read_text())["failures"]
            # A machine that is taken away leaves what was found until then.
            write(out, found, outcomes, results, failed_tests)
            for path in (log_of(task, options.work) for task in tasks):
                if path.exists():
                    log.write(f"===== {path.stem}\n{path.read_text(errors='replace')}\n")
            log.flush()
    promised = verdicts(results, found["device"])
    missed = [target.name for target in promised if not target.met]
    rows = [(t.name, t.wanted, t.text, t.verdict) for t in promised]
    header = ("target", "wanted", "measured", "verdict")
    console = Console(width=None if sys.stdout.isatty() else 160)
    show(console, [*stages(outcomes), *([Table("Targets", header, rows)] if rows else [])])
    bad = [outcome.name for outcome in outcomes if outcome.is_bad]
    for name in bad:
        print(f"failed: {name}", file=sys.stderr)
    for name in missed if "benchmarks" in options.stages else []:
        print(f"not met: {name}", file=sys.stderr)
    print(f"{out / NAME}.md, after {time.monotonic() - begin:.0f} s")
    return 1 if bad or ("benchmarks" in options.stages and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
