"""Rows of Markdown tables."""

from __future__ import annotations


def header(*names: str) -> list[str]:
    return [cells(*names), "|" + "---|" * len(names)]


def cells(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def milliseconds(times: list[float]) -> list[str]:
    return [f"{1e3 * time:.1f} ms" for time in times]
