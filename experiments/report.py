"""One page of what the experiments measured, beside the papers' figures.

python -m experiments.report --results docs/results --page docs/results.md
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import papers
from experiments.editing import MEASURES, harmonic
from experiments.journal import judged
from experiments.retention import untold
from experiments.tables import percent

INTRODUCTION = """# The papers' experiments

Written by `python -m experiments.report` from what the experiments left in a folder; each ran over HTTP against a
`memoryllm serve`, by the command that it names, with seed, machine and date. All of them, with counts of its own that
are mostly larger, and this page, by one:

    memoryllm serve        # in another terminal
    python -m experiments.everything --squad FILE --zsre FILE --counterfact FILE --minutes 1.5 \\
        --results docs/results --page docs/results.md

`--scale 0.1` runs a tenth of each. `--minutes` adds *forgetting*, which trains and serves small models of its own: left
out, the server alone is measured. `--url` names another server; one with keys is asked with an admin's in
`MEMORYLLM_API_KEY`. A model without a chat template, such as `YuWangX/memoryllm-8b`, is asked by
`--template "Question: {question} Answer:"`; its answer ends with the line. Interrupted commands go on where they were.

The files: SQuAD is at https://rajpurkar.github.io/SQuAD-explorer (XQuAD, in its format, at
https://github.com/google-deepmind/xquad), zsRE in MEND's form and CounterFact at https://rome.baulab.info/data/dsets.
Nothing is downloaded.

Errors are standard errors, as if every answer stood by itself: where several come from one memory they may be larger.
Texts are written with `"short": "fill"`: one that is shorter than a block is repeated until it fills one. Of generated
facts the names, and the values that are names or words (six in ten), are held out of the pocket model's training;
numbers, dates, times, codes and values from short lists are drawn as there. An answer counts by one of two rules
(`--judge`): *exact*, if it equals the value, for the pocket model; *holds*, if the value stands in it as whole words
and, of several people, no other's does, for other models, and for SQuAD, where it is one of the answers. Where nothing
is known, an answer that says so is right. What a prompt holds itself never counts.
Results name their model's fingerprint: one of another model than its neighbours' has not been run since.
"""


WHAT_IS_ASKED = """Each item has a memory of its own.

- *people n*: n are told of, one fact each, all of one relation, in separate updates; all are asked for.
- *used* and *unseen wordings*: one fact, asked for as in the pocket model's training, and as nowhere in it.
- *corrections*: a fact, three others, then the same fact with another value, which is right; *said so*: the newer one
  begins with "Actually", "Correction:" or the like.
- *unknown*: four facts of other relations, then a question about somebody never mentioned."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def with_error(share: float, count: int) -> str:
    """A share of ``count`` trials with its standard error."""
    return f"{share:.1%} ± {100 * (share * (1 - share) / max(1, count)) ** 0.5:.1f}"


def origin(told: dict[str, Any]) -> str:
    model = told.get("settings", {}).get("model")
    served = f"model {model} ({told['settings']['fingerprint'][:8]}), " if model else ""
    measured_on = f"Seed {told['seed']}, {served}{told['device']}, {told['machine']}, {told['date']}"
    return f"    {told['command']}\n\n{measured_on}{_rule(told)}."


def _rule(told: dict[str, Any]) -> str:
    """How answers were judged; editing has none."""
    return "" if told["experiment"] == "editing" else f"; judged: {judged(told.get('settings', told))}"


def retention(told: dict[str, Any]) -> str:
    settings = told["settings"]
    told_of = settings["squad"] or "generated facts"
    warm = f", in memories that had taken {settings['warm']} other updates" if settings["warm"] else ""
    control = ", **control: judged by the answers of other items**" if settings["shuffle"] else ""
    rows = []
    for row in told["rows"]:
        kept, count = row["survival"], row["items"]
        distance = "-" if kept["distance"] is None else f"{kept['distance']:+.2f}"
        rows.append(
            [
                str(row["step"]),
                with_error(row["memory"], count),
                percent(row["empty"]),
                percent(row["prompt"]) + _fitted(row),
                f"{kept['measured']:.2%} ± {100 * kept['standard_error']:.2f}",
                f"{kept['closed_form']:.2%}",
                distance,
            ]
        )
    head = [
        "contexts since",
        "memory",
        untold(settings["warm"]),
        "text in the prompt",
        "tokens of its last block left",
        "(1 − K/N)^t",
        "errors apart",
    ]
    return f"{told['rows'][0]['items']} items of {told_of}{warm}{control}:\n\n{table(head, rows)}"


def _fitted(row: dict[str, Any]) -> str:
    """How many prompts there were where some had become too long; older results do not say."""
    count = row.get("prompts", row["items"])
    return f" of {count}" if 0 < count < row["items"] else ""


def questions(told: dict[str, Any]) -> str:
    rows = [
        [row, with_error(c["share"], c["asked"]), str(c["asked"]), percent(c["chance"]), str(c["another_of_them"]),
         str(c["refused"])]
        for row, c in told["rows"].items()
    ]  # fmt: skip
    head = ["asked for", "right", "questions", "chance", "another of them named", "“I don't know”"]
    return f"{WHAT_IS_ASKED}\n\n{table(head, rows)}"


def editing(told: dict[str, Any]) -> str:
    rows = []
    for name, row in told["rows"].items():
        shown = [f"{row[m]:.1%} ± {100 * row[f'{m}_error']:.1f}" for m in MEASURES]
        rows.append([name, *shown, percent(row["score"]), percent(row.get("kept_predictions"))])
    for name, paper in papers.EDITING.get(told["data"], {}).items():
        shown = [*map(percent, paper), percent(harmonic(list(paper)))]
        rows.append([f"the paper's 7B model, {name}", *shown, "-"])
    head = ["", *MEASURES, "harmonic mean", "other predictions kept"]
    return f"{told['cases']} cases, {told['data']}:\n\n{table(head, rows)}"


def integrity(told: dict[str, Any]) -> str:
    counts = [one["updates"] for one in told["tenants"]]
    same = all(one["updates"] == one["version"] for one in told["tenants"])
    each = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    settings = told.get("settings", {})
    every = settings.get("ask_every", 1)
    asking = "each with its question" if every == 1 else f"a question behind every {every} of a memory"
    kills = ", ".join(f"{kill:,}" for kill in told["kills_behind_answers"]) or "none"
    rows = [
        ["updates, memories, updates of each", f"{told['updates']:,}, {len(counts)}, {each}"],
        ["the server's versions", "as many as the updates" if same else "**not as many as the updates**"],
        ["answers about the newest fact", f"{told['answers']:,}"],
        ["right", with_error(told["accuracy"], told["answers"]) if told["answers"] else "-"],
        [f"right, first {told['ends']:,}", with_error(told["first"], told["ends"])],
        [f"right, last {told['ends']:,}", with_error(told["last"], told["ends"])],
        [f"right, among a memory's first {told['young']['turns']} updates", _of(told["young"])],
        ["right, later", _of(told["settled"])],
        ["killed and resumed behind answer", kills],
        # a run that was resumed has counted none of the time before
        [f"updates a second since it was last begun or resumed, {asking}", f"{told['updates_a_second']:.0f}"],
    ]
    if "servers" in settings:
        rows.insert(1, ["servers", str(settings["servers"])])
    first = settings.get("at_first")
    how = (
        f"The first {told['ends']:,} updates are of {first} memories, then the others join.\n\n"
        if first
        else ""
    )
    return how + table(["", ""], rows)


def _of(counts: dict[str, int]) -> str:
    asked = counts["answers"]
    return f"{with_error(counts['right'] / asked, asked)} of {asked:,}" if asked else "-"


def forgetting(told: dict[str, Any]) -> str:
    steps = [row["step"] for row in next(iter(told["shapes"].values()))["rows"]]
    rows = [
        [
            f"{name} ({one['fingerprint'][:8]})" if "fingerprint" in one else name,
            *(f"{percent(row['memory'])} ({percent(row['survival']['closed_form'])})" for row in one["rows"]),
        ]
        for name, one in told["shapes"].items()
    ]
    minutes = told["minutes"]
    count = next(iter(told["shapes"].values()))["rows"][0]["items"]
    how = (
        "checkpoints as given"
        if minutes is None
        else f"each trained for {minutes:g} minutes from the same weights"
    )
    if told.get("start"):
        how += f" ({told['start'][:8]})"
    if told.get("start_shape"):
        how += f", which had been trained as {told['start_shape']} and for longer"
    head = ["shape", *(f"{step} contexts since" for step in steps)]
    return f"{count} items, {how}; right, and in brackets (1 − K/N)^t:\n\n{table(head, rows)}"


SECTIONS = {
    "retention": ("Knowledge retention", retention, papers.RETENTION),
    "questions": ("The right person, other wordings, corrections, the unknown", questions, ""),
    "editing": ("Model editing", editing, papers.EDITING_NOTE),
    "integrity": ("Integrity", integrity, papers.INTEGRITY),
    "forgetting": ("Forgetting by K and N", forgetting, papers.FORGETTING),
}


def page(results: Path, at: Path) -> str:
    """The whole page, for a file that lies ``at``; experiments without results are left out."""
    told = []
    for path in sorted(results.glob("*.json"), key=lambda path: path.stem):
        one = json.loads(path.read_text("utf-8"))
        if isinstance(one, dict) and one.get("experiment") in SECTIONS:
            told.append(one | {"path": path})
    parts = [INTRODUCTION]
    for experiment, (title, show, paper) in SECTIONS.items():
        own = [one for one in told if one["experiment"] == experiment]
        if not own:
            continue
        parts.append(f"## {title}\n" + (f"\n{paper}\n" if paper else ""))
        for one in own:
            parts.append(f"### {one['path'].stem}\n\n{origin(one)}\n\n{show(one)}\n")
            plot = one["path"].with_suffix(".svg")
            if plot.exists():
                link = Path(os.path.relpath(plot, at.parent)).as_posix()
                parts.append(f"![{one['path'].stem}]({link})\n")
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--page", type=Path, default=Path("results/README.md"))
    arguments = parser.parse_args()
    if not any(arguments.results.glob("*.json")):
        raise SystemExit(f"{arguments.results} holds no results")
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(page(arguments.results, arguments.page), "utf-8")
    print(arguments.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
