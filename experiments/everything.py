"""All experiments one after another against one server, and the page of their results.

    python -m experiments.everything --squad FILE --zsre FILE --counterfact FILE --results docs/results

``--scale 0.1`` runs a tenth of each. What is interrupted goes on where it was; ``--fresh`` begins anew. Experiments
whose file is not given are left out, and so are those that ``--skip`` names. Forgetting serves models of its own
(``--minutes`` of training each) and is left out unless that is given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments import report
from experiments.children import run
from experiments.session import judging


def plan(arguments: argparse.Namespace) -> list[list[str]]:
    """The commands, without the options that all share."""

    def count(whole: int, least: int = 4) -> str:
        return str(max(least, round(whole * arguments.scale)))

    steps = ["--steps", "0", "1", "5", "10", "20", "50"]
    long = [*steps, "100", "200"]
    commands = [
        ["retention", "--items", count(500), *steps],
        ["retention", "--items", count(200), *steps, "--warm", "100", "--name", "retention-warm"],
        ["retention", "--items", count(50), *long, "--name", "retention-long"],
        ["retention", "--items", count(200), "--steps", "0", "--shuffle", "--name", "retention-shuffled"],
        ["questions", "--items", count(200)],
        ["editing", "--generated", "--cases", count(2000), "--name", "editing-generated"],
        ["integrity", "--updates", count(arguments.updates, 100), "--kill-at", count(2000, 20)],
    ]
    commands[-1] += ["--erase"] * arguments.erase
    if arguments.squad:
        words = ["--squad", str(arguments.squad), "--name", "retention-squad"]
        commands.insert(3, ["retention", "--items", count(200), *steps[:-1], *words])
    for kind in ("zsre", "counterfact"):
        path = getattr(arguments, kind)
        if path:
            words = [f"--{kind}", str(path), "--cases", count(2000), "--name", f"editing-{kind}"]
            commands.insert(-1, ["editing", *words])
    for command in commands:
        if arguments.template and command[0] != "editing":
            command.extend(["--template", arguments.template])
    if arguments.minutes:
        commands.append(["forgetting", "--minutes", f"{arguments.minutes:g}", "--items", count(200)])
    for command in commands:
        if arguments.judge and command[0] != "editing":
            command.extend(["--judge", arguments.judge])
    return [command for command in commands if command[0] not in arguments.skip]


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.everything",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="a running memoryllm serve")
    add("--results", type=Path, default=Path("results"), help="folder of JSON, plots and journals")
    add("--page", type=Path, help="the report (default: README.md in that folder)")
    add("--seed", type=int, default=1)
    add("--concurrency", type=int, default=8)
    add("--scale", type=float, default=1.0, help="of every count")
    add("--updates", type=int, default=1_000_000, help="of integrity, before --scale")
    add("--squad", type=Path, help="a file in SQuAD's format")
    add("--zsre", type=Path, help="a file of zsRE in MEND's form")
    add("--counterfact", type=Path, help="a file of CounterFact")
    add("--template", help='for models without a chat template, such as "Question: {question} Answer:"')
    judging(parser)
    add(
        "--minutes", type=float, default=0.0, help="of training for each shape of forgetting (0: none is run)"
    )
    add("--skip", nargs="*", default=[], help="experiments to leave out")
    add("--erase", action="store_true", help="erase the memories of integrity at the end")
    add("--fresh", action="store_true", help="begin anew")
    add("--quiet", action="store_true", help="no progress bars")
    return parser


def main() -> int:
    arguments = options().parse_args()
    shared = ["--url", arguments.url, "--results", str(arguments.results)]
    shared += ["--seed", str(arguments.seed), "--concurrency", str(arguments.concurrency)]
    shared += ["--fresh"] * arguments.fresh + ["--quiet"] * arguments.quiet
    failed = []
    for name, *words in plan(arguments):
        print(f"== {name} {' '.join(words)}", flush=True)
        if run([sys.executable, "-m", f"experiments.{name}", *words, *shared]):
            failed.append(name)
    page = arguments.page or arguments.results / "README.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(report.page(arguments.results, page), "utf-8")
    print(page)
    if failed:
        print(f"these failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
