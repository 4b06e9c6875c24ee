"""Model editing (MemoryLLM) through POST /update and POST /score, beside the unedited model.

    python -m experiments.editing --generated
    python -m experiments.editing --zsre zsre_mend_eval.json
    python -m experiments.editing --counterfact counterfact.json

zsRE: the share of the new answer's tokens that are the model's own first choice, given those before (efficacy; with
another wording: generalization; the known answer to an unrelated question: specificity). CounterFact: how often the new
target is likelier than the true one, by the mean negative log-probability of a token (for specificity: less likely,
at a prompt about something else). A kept prediction is one of the specificity tokens' first choices that editing
left as it was. Every case begins with a copy of the model's own memory; of generated cases, with a copy of a memory
that knows some other facts. Where the files come from is said in ``experiments/cases.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from experiments import cases as data
from experiments import plot
from experiments.cases import Case, Cases, Probe
from experiments.data import SEED_STRIDE
from experiments.session import Session, conduct, parser
from experiments.tables import percent, print_rows

MEASURES = ("efficacy", "generalization", "specificity")


class Editing:
    """One run. Of a case are kept, before and after the edit: each measure's value; and the predictions kept."""

    def __init__(self, session: Session, cases: Cases) -> None:
        self.session, self.client, self.cases = session, session.client, cases
        self._making: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._ready: set[int] = set()

    async def run(self) -> dict[str, Any]:
        items = await self.session.play(
            [str(index) for index in range(len(self.cases.cases))], self.measure, "cases"
        )
        figures = summary(items) | {"data": self.cases.kind}
        told = self.session.keep(figures, chart(figures))
        for world in range(len(self.cases.worlds)):
            await self.client.erase(self._world(world))
        return told

    async def measure(self, name: str) -> dict[str, Any]:
        index = int(name)
        case, world = self.cases.cases[index], self.cases.world_of[index]
        await self._make(world)
        tenant = self.session.tenant(index)
        await self.client.erase(tenant)
        before, first = await self._scores(case, self._world(world))
        await self.client.fork(self._world(world), tenant)
        await self.client.update(tenant, case.text, short="fill")
        after, second = await self._scores(case, tenant)
        await self.client.erase(tenant)
        kept = [a == b for a, b in zip(first, second, strict=True)]
        return {"before": before, "after": after, "kept": sum(kept) / max(1, len(kept))}

    def _world(self, world: int) -> str:
        return self.session.tenant(f"world-{world}")

    async def _make(self, world: int) -> None:
        async with self._making[world]:
            if world in self._ready:
                return
            seed = self.session.arguments.seed * SEED_STRIDE + world
            await self.client.ensure(self._world(world), seed)
            for turn, text in enumerate(self.cases.worlds[world]):
                await self.client.update(self._world(world), text, short="fill", key=f"known-{turn}")
            self._ready.add(world)

    async def _scores(self, case: Case, tenant: str) -> tuple[dict[str, float], list[int]]:
        """Each measure's value, and the first choices at the specificity targets."""
        found: dict[str, float] = {}
        first: list[int] = []
        for measure in MEASURES:
            values = []
            for probe in getattr(case, measure):
                value, choices = await self._probe(probe, tenant)
                values.append(value)
                if measure == "specificity":
                    first += choices
            found[measure] = statistics.fmean(values)
        return found, first

    async def _probe(self, probe: Probe, tenant: str) -> tuple[float, list[int]]:
        scores = await self.client.score(tenant, probe.prompt, probe.target)
        if probe.rival is None:
            return sum(scores.greedy) / len(scores.greedy), scores.first
        rival = await self.client.score(tenant, probe.prompt, probe.rival)
        return float(statistics.fmean(scores.logprobs) > statistics.fmean(rival.logprobs)), scores.first


def harmonic(values: list[float]) -> float:
    """The harmonic mean; 0 if one of them is."""
    return statistics.harmonic_mean(values) if all(value > 0 for value in values) else 0.0


def summary(items: dict[str, Any]) -> dict[str, Any]:
    """Means over cases with their standard errors, of the unedited and of the edited model."""
    rows: dict[str, dict[str, Any]] = {}
    for name, key in (("unedited", "before"), ("edited", "after")):
        row: dict[str, Any] = {}
        for measure in MEASURES:
            values = [item[key][measure] for item in items.values()]
            row[measure] = statistics.fmean(values)
            row[f"{measure}_error"] = statistics.pstdev(values) / math.sqrt(len(values))
        row["score"] = harmonic([row[measure] for measure in MEASURES])
        rows[name] = row
    rows["edited"]["kept_predictions"] = statistics.fmean(item["kept"] for item in items.values())
    return {"cases": len(items), "rows": rows}


def chart(figures: dict[str, Any]) -> str:
    """Efficacy, generalization and specificity, before and after."""
    names = [f"{number + 1} = {measure}" for number, measure in enumerate(MEASURES)]
    curves = [
        plot.Curve(
            name,
            [(number + 1, row[measure]) for number, measure in enumerate(MEASURES)],
            [row[f"{measure}_error"] for measure in MEASURES],
            dashed=name == "unedited",
        )
        for name, row in figures["rows"].items()
    ]
    title = f"Editing: {figures['data']}, {figures['cases']} cases"
    return plot.line_chart(title, ", ".join(names), "", curves, y_range=(0, 1), y_percent=True)


def options() -> argparse.ArgumentParser:
    made = parser("editing", __doc__)
    add = made.add_argument
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument("--generated", action="store_true", help="facts about people who do not exist")
    which.add_argument("--zsre", type=Path, help="a file of zsRE in MEND's form")
    which.add_argument("--counterfact", type=Path, help="a file of CounterFact")
    add("--cases", type=int, default=2000, help="the first so many")
    add("--target", choices=("answers", "alt"), default="answers", help="zsRE: which answer is the new one")
    return made


def load(arguments: argparse.Namespace) -> Cases:
    """Raises SystemExit for a file that cannot be used."""
    if arguments.generated:
        return data.generated(arguments.seed, arguments.cases)
    kind = "zsre" if arguments.zsre else "counterfact"
    try:
        return data.read(arguments.zsre or arguments.counterfact, kind, arguments.cases, arguments.target)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


def main() -> int:
    arguments = options().parse_args()
    cases = load(arguments)
    told = conduct("editing", arguments, lambda session: Editing(session, cases).run(), {"cases"})
    rows = told["rows"]
    print_rows(
        f"{told['data']}, {told['cases']} cases",
        ["", *MEASURES, "harmonic mean"],
        [[name, *(percent(row[m]) for m in (*MEASURES, "score"))] for name, row in rows.items()],
    )
    print(f"{percent(rows['edited']['kept_predictions'])} of predictions about something else are kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
