"""The load test: ``python -m loadtest [SCENARIO …] [--scale 0.1] [--out build/loadtest]``, or ``make loadtest``.

Starts a server of its own for each scenario that is named (all, if none is), plays it, and prints the table of what
was demanded and what was reached. ``report.html`` and ``figures.json`` in ``--out`` are written after every
scenario. The exit code is 1 if anything falls short.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
import traceback
from pathlib import Path

import uvloop

from loadtest import report
from loadtest.bare import Bare
from loadtest.rows import table
from loadtest.run import MODEL, Result, ended_early, run
from loadtest.scenarios import SCENARIOS


class Progress:
    """One line that is overwritten on a terminal; elsewhere a line a phase."""

    def __init__(self, name: str) -> None:
        self._name, self._began = name, time.monotonic()

    def __call__(self, text: str) -> None:
        line = f"{self._name}: {text} ({time.monotonic() - self._began:.0f} s)"
        end = "" if sys.stderr.isatty() else "\n"
        print(f"\r\x1b[K{line}" if not end else line, end=end, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; default: all"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="1: what is demanded, 0.1: a first look")
    parser.add_argument("--minutes", type=float, default=None, help="how long steady goes on (30 × scale)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/loadtest"))
    options = parser.parse_args(arguments)
    unknown = set(options.scenarios) - set(SCENARIOS)
    if unknown or options.scale <= 0:
        parser.error(f"scenarios are {', '.join(SCENARIOS)}, and a scale is above 0")
    # whoever ends a run by SIGTERM wants its server ended as well
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    minutes = 30 * options.scale if options.minutes is None else options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    with Bare(sizes=MODEL) as bare:
        sizes = bare.sizes
    results: list[Result] = []
    for name in options.scenarios or SCENARIOS:
        log = options.out / f"{name}.log"
        log.unlink(missing_ok=True)
        playing = run(
            name,
            SCENARIOS[name],
            sizes,
            scale=options.scale,
            minutes=minutes,
            seed=options.seed,
            log=log,
            progress=Progress(name),
        )
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                results.append(runner.run(playing))
        except Exception as error:
            # a server that does not start, or does not end: the other scenarios have servers of their own
            traceback.print_exc()
            results.append(Result(name, rows=[ended_early(name, error)]))
        report.write(options.out, results, options.scale)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    rows = report.all_rows(results)
    print(table(rows))
    print(report.conditions(options.scale))
    print(f"{options.out / 'report.html'}")
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
