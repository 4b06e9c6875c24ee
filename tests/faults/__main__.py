"""The breaking bench: ``python -m tests.faults [PART …] [--scale 0.1] [--out torture.json]``, or ``make torture``.

Runs the parts that are named (all, if none is), tells how far it is, and prints the table of what was demanded and
what was reached. The file is written after every part; with ``--resume`` those that it holds already are left alone.
The exit code is 1 if anything falls short.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from loadtest.rows import table
from tests.faults import report
from tests.faults.parts import PARTS


class Progress:
    """One line that is overwritten on a terminal; elsewhere a line every half minute."""

    def __init__(self, name: str) -> None:
        self._name, self._began, self._shown = name, time.monotonic(), 0.0

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if now - self._shown < (0.2 if sys.stderr.isatty() else 30.0):
            return
        self._shown = now
        line = f"{self._name}: {text} ({now - self._began:.0f} s)"
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="1: what is demanded, 0.01: a first look")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/torture.json"))
    parser.add_argument("--resume", action="store_true", help="leave alone what --out holds already")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    done = report.read(options.out) if options.resume else {}
    for name in options.parts or PARTS:
        if name in done:
            continue
        progress = Progress(name)
        try:
            done[name] = PARTS[name](options.scale, options.seed, progress)
        finally:
            progress.end()
        report.write(options.out, done)
    rows = [row for name in PARTS for row in done.get(name, ())]
    print(table(rows))
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
