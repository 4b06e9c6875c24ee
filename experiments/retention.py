"""Knowledge retention (MemoryLLM, M+): tell a context, ask at once and after t others.

    python -m experiments.retention --items 500 --steps 0 1 5 10 20 50
    python -m experiments.retention --warm 100 --name retention-warm
    python -m experiments.retention --squad dev-v1.1.json --name retention-squad

Each item has a memory with a seed of its own. At every step three answers stand beside each other: that of the memory,
that of the memory before it was told (empty, or with ``--warm n`` a copy of one that has taken n other updates), and
that of an empty memory with all the texts in the prompt, as far as they fit. What is left of the context's tokens is
counted in the server's own view of the memory, beside (1 - K/N)^t. ``--shuffle`` judges every question by the answers
of another item: what is scored then is chance.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx

from experiments import plot
from experiments.closed_form import Survival
from experiments.data import SEED_STRIDE, Generated, Item, Shuffled, Source, Squad
from experiments.session import Session, asking, conduct, parser
from experiments.tables import percent, print_rows, share

ITEMS_A_BASE = 10
WARM_STREAM = 500_000_000  # streams of unrelated contexts that are no item's
MISSES = 40


class Retention:
    """One run. ``unit`` numbers independent draws of what is forgotten: copies of one memory forget alike."""

    def __init__(self, session: Session) -> None:
        self.session, self.client, self.given = session, session.client, session.arguments
        self.source: Source = source_of(self.given, session.exact)
        self.count: int = min(self.given.items, self.source.size)
        if self.given.shuffle:
            if self.count < 2:
                raise SystemExit("--shuffle needs two items at least")
            self.source = Shuffled(self.source, self.count)
        self.steps = sorted(set(self.given.steps))
        self._warming: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def run(self) -> dict[str, Any]:
        items = await self.session.play([str(index) for index in range(self.count)], self.measure)
        figures = summary(items, self.steps)
        if self.given.squad:
            figures["misses"] = []  # they quote the file
        title = "Retention" + (" (control: shuffled)" * self.given.shuffle)
        told = self.session.keep(figures, chart(figures, title, untold(self.given.warm)))
        for name in ["empty", *(f"base-{number}" for number in range(self.bases))]:
            await self.client.erase(self.session.tenant(name))
        return told

    @property
    def bases(self) -> int:
        return -(-self.count // ITEMS_A_BASE) if self.given.warm else 0

    async def measure(self, name: str) -> dict[str, Any]:
        """Plays one item through, in a memory that is erased at the end."""
        index = int(name)
        item, others = self.source.item(index), self.source.unrelated(index)
        tenant = self.session.tenant(index)
        unit = await self._begin(index, tenant)
        measured: dict[str, Any] = {
            "unit": unit,
            "question": item.question,
            "answers": item.answers,
            "steps": {},
        }
        measured["empty"] = await self._right(item, tenant)
        answer = await self.client.update(tenant, item.context, short="fill")
        version, texts = answer["memory_version"], [item.context]
        for step in self.steps:
            for text in itertools.islice(others, step + 1 - len(texts)):
                texts.append(text)
                await self.client.update(tenant, text, short="fill")
            given = await self._ask(item, tenant)
            measured["steps"][str(step)] = {
                "given": given,
                "memory": item.right(given, self.client.asked(item.question)),
                "prompt": await self._with_text(item, texts),
                **await self._left(tenant, version),
            }
        await self.client.erase(tenant)
        return measured

    async def _begin(self, index: int, tenant: str) -> int:
        await self.client.erase(tenant)
        if not self.given.warm:
            await self.client.create(tenant, self.given.seed * SEED_STRIDE + index)
            return index
        number = index // ITEMS_A_BASE
        base = self.session.tenant(f"base-{number}")
        async with self._warming[number]:
            await self._warm(base, number)
        await self.client.fork(base, tenant)
        return number

    async def _warm(self, base: str, number: int) -> None:
        """A memory that has taken ``--warm`` other updates; each is sent once, whatever was interrupted."""
        seed = self.given.seed * SEED_STRIDE + number
        await self.client.ensure(base, seed)
        first = number * ITEMS_A_BASE
        own = {self.source.item(i).context for i in range(first, min(first + ITEMS_A_BASE, self.count))}
        others = (text for text in self.source.unrelated(WARM_STREAM + number) if text not in own)
        for turn, text in enumerate(itertools.islice(others, self.given.warm)):
            await self.client.update(base, text, short="fill", key=f"warm-{turn}")

    async def _ask(self, item: Item, tenant: str, before: str = "") -> str:
        return await self.client.ask(tenant, item.question, self.given.max_tokens, before)

    async def _right(self, item: Item, tenant: str) -> bool:
        return item.right(await self._ask(item, tenant), self.client.asked(item.question))

    async def _with_text(self, item: Item, texts: list[str]) -> bool | None:
        """None where the prompt has become too long for the model."""
        try:
            given = await self._ask(item, self.session.tenant("empty"), " ".join(texts))
        except httpx.HTTPStatusError as error:
            if error.response.status_code != 422:
                raise
            return None
        return item.right(given, self.client.asked(item.question))

    async def _left(self, tenant: str, version: int) -> dict[str, Any]:
        """How many tokens of the context's last block each layer still holds, and how many updates ago it was."""
        view = await self.client.memory(tenant)
        held = [
            sum(entry["tokens"] for entry in layer["versions"] if entry["version"] == version)
            for layer in view["layers"]
        ]
        return {
            "age": view["memory_version"] - version,
            "held": held,
            "num_tokens": view["num_tokens"],
            "num_blocks": view["num_blocks"],
        }


def source_of(arguments: argparse.Namespace, exact: bool) -> Source:
    """Raises SystemExit for a file that cannot be used."""
    if arguments.squad is None:
        return Generated(arguments.seed, exact)
    try:
        return Squad(arguments.squad, arguments.seed, exact)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


def summary(items: dict[str, Any], steps: list[int]) -> dict[str, Any]:
    """Shares by step, and survival beside the closed form."""
    rows: list[dict[str, Any]] = []
    for step in steps:
        told = [item["steps"][str(step)] for item in items.values()]
        in_prompt = [one["prompt"] for one in told if one["prompt"] is not None]
        kept, seen = Survival(), set()
        for item, one in zip(items.values(), told, strict=True):
            if item["unit"] not in seen:
                seen.add(item["unit"])
                for held in one["held"]:
                    pool = one["num_tokens"] * one["num_blocks"]
                    kept.add(held / one["num_tokens"], one["num_tokens"], pool, one["age"])
        rows.append(
            {
                "step": step,
                "items": len(told),
                "memory": share(one["memory"] for one in told),
                "empty": share(item["empty"] for item in items.values()),
                "prompt": share(in_prompt) if in_prompt else None,
                "prompts": len(in_prompt),
                "survival": kept.figures(),
            }
        )
    misses = [
        {"step": step, "question": item["question"], "answers": item["answers"], "given": one["given"]}
        for item in items.values()
        for step, one in item["steps"].items()
        if not one["memory"]
    ]
    any_step = next(iter(items.values()))["steps"][str(steps[0])]
    shape = {"num_tokens": any_step["num_tokens"], "num_blocks": any_step["num_blocks"]}
    return {"rows": rows, "shape": shape, "misses": misses[:MISSES]}


def untold(warm: int) -> str:
    """What the memory is before the item is told."""
    return "before it was told" if warm else "empty memory"


def chart(figures: dict[str, Any], title: str, before: str) -> str:
    """The three rows, the measured survival and the closed form, by step; ``before`` names the memory not yet told."""
    rows = figures["rows"]

    def curve(name: str, key: str) -> plot.Curve:
        told = [row for row in rows if row[key] is not None]
        # prompts that became too long were not asked
        counts = [row.get("prompts", row["items"]) if key == "prompt" else row["items"] for row in told]
        errors = [(row[key] * (1 - row[key]) / count) ** 0.5 for row, count in zip(told, counts, strict=True)]
        return plot.Curve(name, [(row["step"], row[key]) for row in told], errors)

    curves = [
        curve("memory", "memory"),
        curve("text in the prompt", "prompt"),
        curve(before, "empty"),
        plot.Curve("tokens that survive", [(row["step"], row["survival"]["measured"]) for row in rows]),
        # t counts updates, of which a long context takes several
        plot.Curve(
            "closed form (1 - K/N)^t",
            [(row["step"], row["survival"]["closed_form"]) for row in rows],
            dashed=True,
        ),
    ]
    drawn = [one for one in curves if one.points]
    return plot.line_chart(title, "other contexts since", "right", drawn, y_range=(0, 1), y_percent=True)


def options() -> argparse.ArgumentParser:
    made = parser("retention", __doc__)
    add = made.add_argument
    add("--items", type=int, default=500)
    add("--steps", type=int, nargs="+", default=[0, 1, 5, 10, 20, 50], help="other contexts between")
    add("--warm", type=int, default=0, help="other updates that the memory has taken before")
    add("--squad", type=Path, help="a file in SQuAD's format instead of generated facts")
    asking(made)
    add("--shuffle", action="store_true", help="control: judge by the answers of other items")
    return made


def extendable(arguments: argparse.Namespace) -> set[str]:
    """A run may go on with more items, unless what they are judged by depends on their number."""
    return set() if arguments.shuffle else {"items"}


def main() -> int:
    arguments = options().parse_args()
    told = conduct("retention", arguments, lambda session: Retention(session).run(), extendable(arguments))
    print_rows(
        f"{told['rows'][0]['items']} items",
        [
            "contexts since",
            "memory",
            untold(arguments.warm),
            "text in prompt",
            "tokens left",
            "closed form",
            "standard errors apart",
        ],
        [
            [
                str(row["step"]),
                *(percent(row[key]) for key in ("memory", "empty", "prompt")),
                percent(row["survival"]["measured"]),
                percent(row["survival"]["closed_form"]),
                f"{row['survival']['distance']:+.2f}" if row["survival"]["distance"] is not None else "-",
            ]
            for row in told["rows"]
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
