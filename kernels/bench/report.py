"""The benchmark's rows: printed as a table, appended to a CSV."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

_NAMES = ("date", "device", "torch", "triton", "what", "case", "value", "unit", "at least", "aim", "note")


@dataclass(frozen=True)
class Row:
    """One figure. ``least`` and ``aim`` are bounds from below, from above if ``less`` is better; None: no bound."""

    what: str
    case: str
    value: float
    unit: str
    least: float | None = None
    aim: float | None = None
    less: bool = False
    note: str = ""

    @property
    def reached(self) -> bool | None:
        if self.least is None:
            return None
        return self.value <= self.least if self.less else self.value >= self.least


def show(row: Row) -> str:
    """A line for people."""
    bound = ""
    if row.least is not None:
        sign = "<=" if row.less else ">="
        aim = "" if row.aim is None else f", aim {row.aim:g}"
        bound = f"{'ok    ' if row.reached else 'MISSED'} {sign} {row.least:g}{aim}"
    return f"{row.what:52}{row.case:22}{row.value:10.3f} {row.unit:10}{bound:26}{row.note}".rstrip()


def append(path: Path, device: str, rows: Iterable[Row]) -> None:
    """Adds ``rows`` to the CSV at ``path``, with a header if it is new."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(_NAMES)
        for row in rows:
            line = [
                today,
                device,
                torch.__version__,
                triton.__version__,
                row.what,
                row.case,
                f"{row.value:.5g}",
            ]
            bounds = ["" if bound is None else f"{bound:g}" for bound in (row.least, row.aim)]
            writer.writerow([*line, row.unit, *bounds, row.note])
