"""Is it the right memory that answers? The right person, other wordings, what has changed, what was never told.

    python -m experiments.questions --items 200

people       n people, one fact each, of the same relation, in separate updates; all are asked for. Naming one of the n
             at random would be right in 1 of n; an answer in a sentence may name none of the others.
wordings     one fact, asked for in a wording the pocket model's training never used, beside one that it did.
corrections  a fact, three others, then the same fact with another value: the newer one is right. ``said so``: it
             begins with "Actually", "Correction:" or the like.
unknown      four facts about others; then a question about somebody never mentioned: "I don't know" is right.

Each item has a memory with a seed of its own. Facts are generated; names, and values that are names or words, are held
out of the training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from experiments import plot
from experiments.answers import holds, refuses
from experiments.data import SEED_STRIDE, Item, fair_fact, generator, item_of
from experiments.session import Session, asking, conduct, parser
from experiments.tables import percent, print_rows
from experiments.wordings import asked_anew
from training.facts import Fact, FactGenerator
from training.variety import CORRECTIONS, without_capital

PEOPLE = (2, 4, 8)
BETWEEN = 3
TOLD = 4
MISSES = 40


class Questions:
    """One run. What an item measures is a list of [row, right, question, answer, given]."""

    def __init__(self, session: Session) -> None:
        self.session, self.client, self.given = session, session.client, session.arguments
        self.parts: dict[str, Callable[[FactGenerator, str, int], Awaitable[list[list[Any]]]]] = {
            **{f"people {n}": self._people for n in PEOPLE},
            "wordings": self._wordings,
            "corrections": self._corrections,
            "unknown": self._unknown,
            "corrections, said so": self._said_so,
        }

    async def run(self) -> dict[str, Any]:
        names = [f"{part}/{index}" for index in range(self.given.items) for part in self.parts]
        items = await self.session.play(names, self.measure)
        figures = summary(items, self.session.exact)
        return self.session.keep(figures, chart(figures["rows"]))

    async def measure(self, name: str) -> list[list[Any]]:
        part, number = name.split("/")
        index = list(self.parts).index(part) * 10_000_000 + int(number)
        stream = generator(self.given.seed, index)
        tenant = self.session.tenant(index)
        await self.client.erase(tenant)
        await self.client.create(tenant, self.given.seed * SEED_STRIDE + index)
        count = int(part.split()[1]) if part.startswith("people") else 1
        found = await self.parts[part](stream, tenant, count)
        await self.client.erase(tenant)
        return found

    async def _tell(self, tenant: str, fact: Fact) -> None:
        await self.client.update(tenant, fact.statement, short="fill")

    async def _asked(self, row: str, tenant: str, item: Item) -> list[Any]:
        given = await self.client.ask(tenant, item.question, self.given.max_tokens)
        return [
            row,
            item.right(given, self.client.asked(item.question)),
            item.question,
            item.answers[0],
            given,
        ]

    async def _people(self, stream: FactGenerator, tenant: str, count: int) -> list[list[Any]]:
        facts = people(stream, count)
        for fact in facts:
            await self._tell(tenant, fact)
        asked = []
        for fact in facts:
            others = tuple(other.answer for other in facts if other is not fact)
            item = replace(item_of(fact, self.session.exact), rivals=others)
            asked.append(await self._asked(f"people {count}", tenant, item))
        return asked

    async def _wordings(self, stream: FactGenerator, tenant: str, _: int) -> list[list[Any]]:
        fact, question = fair_fact(stream), None
        while question is None:
            fact = fair_fact(stream)
            question = asked_anew(fact, stream.rng)
        await self._tell(tenant, fact)
        usual = item_of(fact, self.session.exact)
        unseen = replace(usual, question=question)
        return [
            await self._asked("used wordings", tenant, usual),
            await self._asked("unseen wordings", tenant, unseen),
        ]

    async def _corrections(self, stream: FactGenerator, tenant: str, _: int) -> list[list[Any]]:
        return await self._corrected("corrections", stream, tenant, "")

    async def _said_so(self, stream: FactGenerator, tenant: str, _: int) -> list[list[Any]]:
        return await self._corrected("corrections, said so", stream, tenant, stream.rng.choice(CORRECTIONS))

    async def _corrected(self, row: str, stream: FactGenerator, tenant: str, lead_in: str) -> list[list[Any]]:
        fact = fair_fact(stream)
        newer = stream.changed(fact)
        if lead_in:
            newer = replace(newer, statement=lead_in + without_capital(newer.statement))
        await self._tell(tenant, fact)
        for _ in range(BETWEEN):
            await self._tell(tenant, stream.unrelated(fact))
        await self._tell(tenant, newer)
        return [await self._asked(row, tenant, item_of(newer, self.session.exact))]

    async def _unknown(self, stream: FactGenerator, tenant: str, _: int) -> list[list[Any]]:
        fact = fair_fact(stream)
        for _ in range(TOLD):
            await self._tell(tenant, stream.unrelated(fact))
        given = await self.client.ask(tenant, fact.question, self.given.max_tokens)
        # as everywhere, what the prompt says itself does not count
        right = refuses(given) and not refuses(self.client.asked(fact.question))
        return [["unknown", right, fact.question, "I don't know", given]]


def people(stream: FactGenerator, count: int) -> list[Fact]:
    """Facts of one relation about ``count`` people, no two of whom share a name or a value."""
    while True:
        first = fair_fact(stream)
        if first.subject is None:
            continue
        facts = [first]
        for _ in range(50 * count):
            if len(facts) == count:
                return facts
            other = stream.about_others(first)
            if all(other.subject != fact.subject and other.answer != fact.answer for fact in facts):
                facts.append(other)


def names(given: str, others: set[str], exact: bool) -> bool:
    """By the rule that answers are judged by, it is another's value."""
    return given in others if exact else holds(given, others)


def summary(items: dict[str, Any], exact: bool) -> dict[str, Any]:
    """Shares by row; for people, how often another of them was named; how often "I don't know" was said."""
    rows: dict[str, dict[str, Any]] = {}
    misses = []
    for measured in items.values():
        answers = {answer for _, _, _, answer, _ in measured}
        for row, right, question, answer, given in measured:
            counts = rows.setdefault(row, {"asked": 0, "right": 0, "another_of_them": 0, "refused": 0})
            counts["asked"] += 1
            counts["right"] += right
            counts["another_of_them"] += not right and names(given, answers - {answer}, exact)
            counts["refused"] += refuses(given)
            if not right:
                misses.append({"row": row, "question": question, "answer": answer, "given": given})
    for row, counts in rows.items():
        counts["share"] = counts["right"] / counts["asked"]
        counts["chance"] = 1 / int(row.split()[1]) if row.startswith("people") else None
    order = [
        *(f"people {n}" for n in PEOPLE),
        "used wordings",
        "unseen wordings",
        "corrections",
        "corrections, said so",
        "unknown",
    ]
    return {"rows": {row: rows[row] for row in order if row in rows}, "misses": misses[:MISSES]}


def chart(rows: dict[str, dict[str, Any]]) -> str:
    """The right person among n, and chance."""
    told = [(n, rows[f"people {n}"]) for n in PEOPLE]
    errors = [(c["share"] * (1 - c["share"]) / c["asked"]) ** 0.5 for _, c in told]
    curves = [
        plot.Curve("the right person", [(n, c["share"]) for n, c in told], errors),
        plot.Curve("chance", [(n, c["chance"]) for n, c in told], dashed=True),
    ]
    return plot.line_chart(
        "The right person", "people, same relation", "right", curves, y_range=(0, 1), y_percent=True
    )


def options() -> argparse.ArgumentParser:
    made = parser("questions", __doc__)
    add = made.add_argument
    add("--items", type=int, default=200, help="of each kind")
    asking(made)
    return made


def main() -> int:
    told = conduct("questions", options().parse_args(), lambda session: Questions(session).run(), {"items"})
    print_rows(
        "one memory an item",
        ["asked for", "right", "of", "share", "chance", "another of them", "I don't know"],
        [
            [row, str(c["right"]), str(c["asked"]), percent(c["share"]), percent(c["chance"]),
             str(c["another_of_them"]), str(c["refused"])]
            for row, c in told["rows"].items()
        ],
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
