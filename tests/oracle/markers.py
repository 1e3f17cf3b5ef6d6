"""Where the actions of a row lie that is written in a chat template."""

from __future__ import annotations

from collections.abc import Sequence


def marker_actions(
    row: Sequence[int],
    starts: Sequence[Sequence[int]],
    ends: Sequence[int],
    stops: Sequence[Sequence[int]] = (),
    valid: Sequence[bool] | None = None,
) -> list[list[int]]:
    """Return the positions of each action of one row.

    Args:
        row: token ids.
        starts: an action begins behind each of them; where several match, the longest wins.
        ends: an action ends with the first of these tokens.
        stops: or before the first of these sequences.
        valid: or with the last token where this is True; without it, with the row.
    """
    length = len(row)
    if valid is not None:
        length = max((at + 1 for at, real in enumerate(valid) if real), default=0)

    def longest(at: int, sequences: Sequence[Sequence[int]]) -> int:
        """Length of the longest sequence that stands at a position, else 0."""
        found = 0
        for sequence in sequences:
            if list(row[at : min(at + len(sequence), length)]) == list(sequence):
                found = max(found, len(sequence))
        return found

    actions = []
    at = 0
    while at < length:
        begin = longest(at, starts)
        if not begin:
            at += 1
            continue
        at += begin
        action = []
        while at < length and not longest(at, stops):
            action.append(at)
            at += 1
            if row[action[-1]] in ends:
                break
        if action:
            actions.append(action)
    return actions
