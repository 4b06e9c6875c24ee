"""A row of a table of what was demanded and what was reached."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """``good`` is whether ``reached`` is at least what is demanded; ``details`` go to the JSON file only."""

    what: str
    at_least: str
    aim: str
    reached: str
    good: bool
    details: dict[str, Any] = field(default_factory=dict)


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| what | at least | aim | reached | |", "|---|---|---|---|---|"]
    lines += [f"| {r.what} | {r.at_least} | {r.aim} | {r.reached} | {'' if r.good else 'NO'} |" for r in rows]
    return "\n".join(lines)
