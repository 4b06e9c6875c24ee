"""What the breaking bench has reached so far, as a file that an interrupted run goes on with."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from loadtest.rows import Row


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
