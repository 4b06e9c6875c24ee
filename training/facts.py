"""Made-up facts: a statement, a question that does not contain the answer, and the answer.

`FactGenerator` is what evaluations use; the trainer's groups of contexts are built on the same draws.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from training.relations import OPEN_KINDS, RELATIONS, Relation, word_it
from training.words import is_held_out, person, spelled, value

__all__ = ["Claim", "Fact", "FactGenerator", "is_held_out"]


@dataclass(frozen=True)
class Claim:
    """What a fact says, before it is worded; `name` is None in the first person and for things there is one of."""

    relation: Relation
    name: str | None
    value: str

    @property
    def key(self) -> tuple[str, str | None]:
        """Two claims with the same key and different values contradict each other."""
        return self.relation.name, self.name

    def statement(self, rng: random.Random) -> str:
        """One wording of the claim as a sentence."""
        return word_it(rng.choice(self.relation.statements), self.name).replace("{v}", self.value)

    def question(self, rng: random.Random) -> str:
        """One wording of the question the claim answers."""
        return word_it(rng.choice(self.relation.questions), self.name)

    def unfinished(self, rng: random.Random) -> str | None:
        """A sentence that stops where the value would come; None if no wording ends in the value."""
        ends = [text for text in self.relation.statements if text.endswith(" {v}.")]
        return word_it(rng.choice(ends), self.name)[: -len(" {v}.")] if ends else None


@dataclass(frozen=True)
class Fact:
    """One fact as an evaluation needs it. The model's reply is right if `reply.strip() == answer`."""

    statement: str
    question: str
    answer: str
    completion_prompt: str | None
    relation: str
    subject: str | None


class FactGenerator:
    """An endless reproducible stream of facts.

    With `held_out` every spelled word and every pair of real names is one the training split never contains.
    `closed_share` is the share of facts whose value comes from a short list (colours, foods, jobs, …), which a
    model without the memory may guess. Facts are of the given `relations`; ValueError if there are none.
    """

    def __init__(self, seed: int, held_out: bool = True, first_person_share: float = 0.15,
                 closed_share: float = 0.1, relations: Sequence[Relation] = RELATIONS) -> None:  # fmt: skip
        self.rng = random.Random(f"{seed}/{held_out}")
        self.held_out = held_out
        self.first_person_share = first_person_share
        self.closed_share = closed_share
        if not relations:
            raise ValueError("there is no relation to draw from")
        self.relations = {relation.name: relation for relation in relations}
        self._open = [relation for relation in relations if relation.kind in OPEN_KINDS]
        self._closed = [relation for relation in relations if relation.kind not in OPEN_KINDS]

    def relation(self) -> Relation:
        """Draw a relation."""
        closed = self.rng.random() < self.closed_share
        return self.rng.choice((self._closed or self._open) if closed else (self._open or self._closed))

    def name_for(self, relation: Relation) -> str | None:
        """Draw a subject that fits the relation, never the speaker."""
        if relation.subject == "none":
            return None
        if relation.subject == "word":
            return spelled(self.rng, self.held_out)
        return person(self.rng, self.held_out)

    def claim(self, relation: Relation, name: str | None) -> Claim:
        """Draw a value for this relation of this subject; it never equals the subject's name."""
        while True:
            drawn = value(self.rng, relation.kind, self.held_out)
            if drawn != name:
                return Claim(relation, name, drawn)

    def word(self, claim: Claim) -> Fact:
        """Put a claim into words."""
        return Fact(
            statement=claim.statement(self.rng),
            question=claim.question(self.rng),
            answer=claim.value,
            completion_prompt=claim.unfinished(self.rng),
            relation=claim.relation.name,
            subject=claim.name,
        )

    def fact(self, relation: str | None = None) -> Fact:
        """A fact, of the relation with this name if one is given."""
        chosen = self.relations[relation] if relation else self.relation()
        first = chosen.has_first_person and self.rng.random() < self.first_person_share
        return self.word(self.claim(chosen, None if first else self.name_for(chosen)))

    def changed(self, fact: Fact) -> Fact:
        """The same relation of the same subject with another value: it has become so since."""
        chosen = self.relations[fact.relation]
        while True:
            claim = self.claim(chosen, fact.subject)
            if claim.value != fact.answer:
                return self.word(claim)

    def about_others(self, fact: Fact) -> Fact:
        """A fact of the same relation about somebody else (never the speaker), with another value."""
        chosen = self.relations[fact.relation]
        if chosen.subject == "none":
            raise ValueError(f"there is only one subject of {chosen.name}")
        while True:
            claim = self.claim(chosen, self.name_for(chosen))
            if claim.name != fact.subject and claim.value != fact.answer:
                return self.word(claim)

    def unrelated(self, fact: Fact | Collection[str]) -> Fact:
        """A fact about somebody else, of a relation other than the given fact's (or other than those named)."""
        avoid = {fact.relation} if isinstance(fact, Fact) else set(fact)
        while True:
            chosen = self.relation()
            if chosen.name in avoid or chosen.subject == "none":
                continue
            claim = self.claim(chosen, self.name_for(chosen))
            if not isinstance(fact, Fact) or claim.name != fact.subject:
                return self.word(claim)
