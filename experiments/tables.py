"""Shares, and tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def share(right: Iterable[bool]) -> float:
    """Of none: 0."""
    told = list(right)
    return sum(told) / max(1, len(told))


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def print_rows(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
