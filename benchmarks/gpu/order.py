"""The order of the cases: some of every group, and first what was measured longest ago.

Time may run out before the cases do. Each round has one case of every group, so that cases which
take long keep no other group from being measured. In a group those that no kept result of this GPU
has come first, then those of the oldest results: runs one after the other measure all cases.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from .problem import Name
from .results import Results, name_of


def last_measured(folders: Iterable[Path], file: str) -> dict[str, str]:
    """Return by case when it was last measured, by the results in and below some folders."""
    found: dict[str, str] = {}
    for path in {path for folder in folders for path in folder.rglob(file)}:
        try:
            document = json.loads(path.read_text())
        except ValueError:
            # A machine that was taken away may have left half a file.
            continue
        date = document["machine"]["date"]
        for row in Results(document).rows:
            case = str(name_of(row))
            found[case] = max(date, found.get(case, ""))
    return found


def in_order(groups: Mapping[str, Iterable[Name]], measured: Mapping[str, str]) -> list[Name]:
    """Return the cases of all groups in the order in which they are measured.

    Args:
        groups: cases by group, the most important first.
        measured: as `last_measured` returns it; a date as text sorts like the date.
    """
    rounds = []
    for place, names in enumerate(groups.values()):
        oldest = sorted(names, key=lambda name: measured.get(str(name), ""))
        for turn, name in enumerate(oldest):
            rounds.append((turn, measured.get(str(name), ""), place, name))
    return [name for *_, name in sorted(rounds)]
