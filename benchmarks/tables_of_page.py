"""Tables that a command prints, and writes into a page between two comments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path


def renew(
    tables: Mapping[str, Callable[[], list[str]]], names: Iterable[str], page: Path | None
) -> None:
    """Print the tables of these names, and put them in their places on a page if there is one."""
    text = page.read_text() if page else ""
    for name in names:
        table = "\n".join(tables[name]())
        print(f"{name}\n\n{table}\n")
        if page:
            begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
            before, rest = text.split(begin)
            text = f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    if page:
        page.write_text(text)
