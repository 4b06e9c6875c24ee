"""What is told and asked: generated facts about people who do not exist, or paragraphs of a SQuAD-format file.

SQuAD is published at https://rajpurkar.github.io/SQuAD-explorer/, of which the official evaluation takes the
development set; XQuAD, in the same format, at https://github.com/google-deepmind/xquad. Nothing is downloaded here.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from experiments.answers import exactly, holds, told_by
from training.facts import Fact, FactGenerator
from training.relations import RELATIONS

SEED_STRIDE = 1_000_003
ASKED = RELATIONS  # all that the pocket model was trained on


@dataclass(frozen=True)
class Item:
    """One context, a question about it, and the answers that count; ``exact``: nothing else may stand beside them.

    Otherwise they may stand in a sentence, which may hold none of the ``rivals``.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    exact: bool
    rivals: tuple[str, ...] = ()

    def right(self, given: str, asked: str) -> bool:
        """Whether ``given`` answers what was ``asked``, the prompt without contexts; never if that holds the answer."""
        if told_by(asked, self.answers):
            return False
        if self.exact:
            return exactly(given, self.answers)
        # one that is a part of the answer, or of the question, says nothing
        others = [rival for rival in self.rivals if not holds(f"{asked} {' '.join(self.answers)}", [rival])]
        return holds(given, self.answers) and not holds(given, others)


class Source(Protocol):
    """Items by number, each with an endless stream of contexts that have nothing to do with it."""

    @property
    def size(self) -> int:
        """How many items there are."""
        ...

    def item(self, index: int) -> Item: ...

    def unrelated(self, index: int) -> Iterator[str]: ...


def generator(seed: int, index: int) -> FactGenerator:
    """The stream of facts of one item."""
    return FactGenerator(seed * SEED_STRIDE + index, held_out=True, relations=ASKED)


def item_of(fact: Fact, exact: bool = True) -> Item:
    return Item(fact.statement, fact.question, (fact.answer,), exact)


class Generated:
    """Facts whose names and values the pocket model's training never contained."""

    def __init__(self, seed: int, exact: bool = True) -> None:
        self.seed, self.exact, self.size = seed, exact, sys.maxsize

    def item(self, index: int) -> Item:
        return item_of(self._begin(index)[1], self.exact)

    def unrelated(self, index: int) -> Iterator[str]:
        stream, fact = self._begin(index)
        while True:
            yield stream.unrelated(fact).statement

    def _begin(self, index: int) -> tuple[FactGenerator, Fact]:
        stream = generator(self.seed, index)
        return stream, fair_fact(stream)


def fair_fact(stream: FactGenerator) -> Fact:
    """The stream's next fact whose question does not hold its answer by chance."""
    while True:
        fact = stream.fact()
        if not told_by(fact.question, (fact.answer,)):
            return fact


class Shuffled:
    """A control: every question is judged by the answers of another item, so that remembering cannot help."""

    def __init__(self, source: Source, count: int) -> None:
        self._source, self.size = source, count

    def item(self, index: int) -> Item:
        other = self._source.item((index + 1) % self.size)
        return replace(self._source.item(index), answers=other.answers)

    def unrelated(self, index: int) -> Iterator[str]:
        return self._source.unrelated(index)


class Squad:
    """Paragraphs, one question of each; unrelated are paragraphs of other articles."""

    def __init__(self, path: Path, seed: int, exact: bool = False) -> None:
        """Raises ValueError if the file is not in SQuAD's format."""
        self.seed, self.exact = seed, exact
        self._items: list[tuple[int, Item]] = []
        self._contexts: list[tuple[int, str]] = []
        draw = random.Random(seed)
        try:
            articles = json.loads(path.read_text("utf-8"))["data"]
            for number, article in enumerate(articles):
                for paragraph in article["paragraphs"]:
                    self._add(number, paragraph["context"], paragraph["qas"], draw)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path.name} is not in SQuAD's format: {error!r}") from None
        if not self._items or len({number for number, _ in self._contexts}) < 2:
            raise ValueError(f"{path.name} has too little: two articles with questions are needed")
        draw.shuffle(self._items)

    def _add(
        self, number: int, context: str, questions: list[dict[str, object]], draw: random.Random
    ) -> None:
        self._contexts.append((number, context))
        fit = []
        for question in questions:
            given = question["answers"]
            assert isinstance(given, list)
            answers = tuple(sorted({str(answer["text"]) for answer in given}))
            asked = str(question["question"])
            if answers and not told_by(asked, answers):
                fit.append(Item(context, asked, answers, self.exact))
        if fit:
            self._items.append((number, draw.choice(fit)))

    @property
    def size(self) -> int:
        return len(self._items)

    def item(self, index: int) -> Item:
        return self._items[index][1]

    def unrelated(self, index: int) -> Iterator[str]:
        own = self._items[index % len(self._items)][0]
        others = [context for number, context in self._contexts if number != own]
        draw = random.Random(f"{self.seed}/{index}")
        while True:
            yield from draw.sample(others, len(others))
