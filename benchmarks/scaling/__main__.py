"""Print the tables of docs/scaling.md, or write them into the page (`--write`)."""

from __future__ import annotations

import argparse
from pathlib import Path

from .tables import TABLES

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def filled(page: str) -> str:
    """Return the text of the page with the tables as they are now."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = page.split(begin)
        text = "\n".join(table())
        page = f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    return page


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text()))
        return
    for name, table in TABLES.items():
        print(f"{name}\n")
        print("\n".join(table()), end="\n\n")


if __name__ == "__main__":
    main()
