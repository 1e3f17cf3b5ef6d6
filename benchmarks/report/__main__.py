"""Turn the JSON of a benchmark run into tables, plots and a verdict on the targets.

``python -m benchmarks.report results/NAME.json`` writes ``NAME.md`` and ``NAME_*.png`` next to it.
The exit code is 1 if a target is missed or was not measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from .page import Plot, Table, markdown, show
from .results import Results
from .targets import Targets


def headline(results: Results) -> str:
    """Return the machine and the date in a line."""
    machine = results.machine
    peers = "".join(f", {name} {version}" for name, version in results.peers.items() if version)
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
        f"steppo_kernels {machine['steppo_kernels']}{peers}; {machine['date']}, load before "
        f"{machine['load']}; copy of 256 MB: {', '.join(copies)}"
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
    # Its module `report` has the promises, the blocks of the page, and what its columns mean.
    family = importlib.import_module(f"benchmarks.{results.family}.report")
    promises = Targets(results)
    family.promise(promises)
    verdicts = Table(
        "",
        ("target", "wanted", "measured", "verdict"),
        [(t.name, t.wanted, t.text, t.verdict) for t in promises.found],
    )
    blocks = family.blocks(results)
    page = markdown(path.stem, [headline(results), verdicts, *blocks, family.NOTE])
    path.with_suffix(".md").write_text(page.rstrip() + "\n")
    for block in blocks:
        if isinstance(block, Plot):
            block.draw(results, block.path(path.parent, path.stem))
    console = Console(width=None if sys.stdout.isatty() else 132)
    show(console, [headline(results), *blocks, verdicts])
    missed = [target.name for target in promises.found if not target.met]
    for name in missed:
        print(f"not met: {name}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
