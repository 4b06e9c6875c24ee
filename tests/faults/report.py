"""A row of the torture table: what was tried, what the bench demands, what was reached."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
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
    for row in rows:
        lines.append(
            f"| {row.what} | {row.at_least} | {row.aim} | {row.reached} | {'' if row.good else 'NO'} |"
        )
    return "\n".join(lines)


def write(path: Path, parts: dict[str, list[Row]]) -> None:
    """All at once, so that an interrupted run leaves the file of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    told = {name: [asdict(row) for row in rows] for name, rows in parts.items()}
    temporary.write_text(json.dumps(told, indent=2) + "\n")
    os.replace(temporary, path)


def read(path: Path) -> dict[str, list[Row]]:
    """What ``write`` has written; nothing if there is no such file."""
    if not path.exists():
        return {}
    return {name: [Row(**row) for row in rows] for name, rows in json.loads(path.read_text()).items()}
