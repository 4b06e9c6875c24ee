"""Draw the curve of a training run: `python -m experiments.curve training/curve.csv` writes training/curve.svg.

Shares of answers that are right in every token, over the steps since the point before; every question is new.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from experiments import plot


def chart(path: Path) -> str:
    """The known and the unknown by step. Raises ValueError if the file is no curve or has no point."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        curves = [
            plot.Curve(name, [(float(row["step"]), float(row[key])) for row in rows])
            for name, key in (("told: the value", "known"), ("not told: “I don't know”", "unknown"))
        ]
    except KeyError as missing:
        raise ValueError(f"{path.name} has no column {missing}") from None
    return plot.line_chart("Training", "steps", "right", curves, y_range=(0, 1), y_percent=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("curve", type=Path, help="the CSV that training.train kept")
    given = parser.parse_args().curve
    try:
        plot.write(given.with_suffix(".svg"), chart(given))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
