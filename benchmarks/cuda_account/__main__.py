"""Print the account of the CUDA kernels, or write it into its page (`--write`)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from . import code, floors

_PAGE = Path(__file__).parents[1] / "cuda_account.md"
TABLES = {"floors": floors.table, "code": code.table}


def main() -> None:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {_PAGE.name}")
    write = parser.parse_args().write
    page = _PAGE.read_text() if write else ""
    for name, table in TABLES.items():
        text = "\n".join(table())
        print(f"{name}\n\n{text}\n")
        if write:
            begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
            before, rest = page.split(begin)
            page = f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    if write:
        _PAGE.write_text(page)


if __name__ == "__main__":
    main()
