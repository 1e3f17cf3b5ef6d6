"""Which sources have changed since `make gpu-check` measured results that are kept.

``python -m tools.gpu_sources`` has a line for each `gpu_check.json` below `benchmarks/results/`, or
for each file that it is given. It names the units whose digests differ from those of the working
tree (`benchmarks/gpu/sources.py` says what a unit is). Results from before digests were recorded
are `not recorded`.

A page that says of a kernel that it was measured as it is now claims so in a comment:

    <!-- as measured: benchmarks/results/<GPU>/gpu_check.json | csrc/cuda/gae.cu, ... -->

The exit code is 1 if a unit of a claim has changed since. Claims about results without digests
cannot be checked, and pass.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.running import PASSED
from benchmarks.gpu.sources import digests

from .doc_numbers import ROOT, pages

_CLAIM = re.compile(r"<!-- as measured: ([^|]+?)\s*\|([^>]+?)-->")


def recorded(document: dict[str, Any]) -> dict[str, str] | None:
    """Return the digests of results by unit, or None if they have none."""
    found: dict[str, str] | None = document["machine"].get("sources", {}).get("digests")
    return found


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the units that differ, and those that only one of both has."""
    return sorted(unit for unit in before | now if before.get(unit) != now.get(unit))


def said(document: dict[str, Any], now: dict[str, str]) -> str:
    """Return what is known of the sources of results, in a line."""
    before = recorded(document)
    if before is None:
        return "not recorded"
    differ = changed(before, now)
    commit = document["machine"]["sources"].get("git") or "no commit"
    built = any(one["name"] == "build" and one["word"] == PASSED for one in document["stages"])
    # A run without this stage takes what an earlier one has built, of whatever sources.
    note = "" if built else "; the run has not built them"
    what = f"changed since: {', '.join(differ)}" if differ else "as they are"
    return f"{what} ({commit}{note})"


def untrue(page: Path, root: Path, now: dict[str, str]) -> Iterator[str]:
    """Yield what a page claims of units that have changed, or that there are none of."""
    for file, units in _CLAIM.findall(page.read_text()):
        document = json.loads((root / file).read_text())
        for unit in map(str.strip, units.split(",")):
            before = recorded(document)
            if unit not in now:
                yield f"{page.name}: {unit}: there is no such unit"
            elif before is not None and before.get(unit) != now[unit]:
                yield f"{page.name}: {unit} has changed since {file}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="all that are kept by default")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the sources")
    parser.add_argument("--pages", nargs="*", type=Path, help="README.md and docs/*.md by default")
    options = parser.parse_args(arguments)
    now = digests(options.root)
    kept = sorted((options.root / "benchmarks/results").rglob("gpu_check.json"))
    for file in options.files or kept:
        name = file.relative_to(options.root) if file.is_relative_to(options.root) else file
        print(f"{name}: {said(json.loads(file.read_text()), now)}")
    every = pages() if options.pages is None else options.pages
    problems = [line for page in every for line in untrue(page, options.root, now)]
    for line in problems:
        print(line)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
