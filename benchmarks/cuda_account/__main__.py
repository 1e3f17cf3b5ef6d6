"""Print the account of the CUDA kernels, or write it into its page (`--write`)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from ..tables_of_page import renew
from . import code, floors, logits
from .runs import runs

_PAGE = Path(__file__).parents[1] / "cuda_account.md"


def _floors() -> list[str]:
    found, others = runs()
    lines = floors.table(found, others)
    if found:
        when = "; ".join(run.when for run in found)
        lines = [f"Measured: {found[0].device};", f"{when}.", "", *lines]
    return lines


TABLES = {"floors": _floors, "logits": logits.table, "code": code.table}


def main() -> None:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {_PAGE.name}")
    parser.add_argument("--only", choices=TABLES, help="this table alone")
    options = parser.parse_args()
    names = [options.only] if options.only else TABLES
    renew(TABLES, names, _PAGE if options.write else None)


if __name__ == "__main__":
    main()
