"""Groups of contexts for training: what is written into memory, and the rows that ask for it.

A group is G contexts that share a memory pool and are written in their order. A claim may change an earlier one of
the same relation and subject; then only the newest is asked for, so every question has one answer. In a colliding
group all claims come from one to three relations, so that only the name decides.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from training.facts import Claim, FactGenerator
from training.relations import RELATIONS, Relation
from training.tokenizer import ASSISTANT, END, USER
from training.variety import LEAD_INS, american, free_relation, joined, unusual_value, without_capital
from training.words import FIRST_NAMES

NO_LOSS, TEXT, ANSWER = 0, 1, 2
MAX_CONTEXT = 64
LEAD_IN_SHARE = CARELESS_SHARE = 0.08
CHAT_SHARE = 0.06  # contexts written as a chat message
JOINED_SHARE = 0.2  # contexts of several facts that are one sentence
AMERICAN_SHARE = 0.3
UNUSUAL_SHARE = 0.12  # values of any words
FREE_SHARE = 0.08  # claims of a relation that any noun may name


@dataclass(frozen=True)
class GroupShape:
    """How a group is drawn. The shares are probabilities; `facts` are the shares of 1, 2 and 3 facts a context."""

    contexts: int
    facts: tuple[float, float, float] = (0.5, 0.3, 0.2)
    colliding: float = 0.6
    first_person: float = 0.12
    cross: float = 0.5
    in_prompt: float = 0.0
    running_text: float = 0.0
    changed: float = 0.0


@dataclass
class Example:
    """One context and its row of questions. `speaks_of` is a bit set of the relations with no named subject."""

    context: list[int]
    row: list[int]
    kinds: list[int]
    speaks_of: int
    claims: list[Claim] = field(default_factory=list)


class Corpus:
    """Draws groups of examples. `names` and `nouns`, capitalised and plain words of running text, stand in for some
    names and values, so that every piece of the vocabulary occurs in them; `texts` give contexts of running English.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        seed: int,
        min_tokens: int,
        names: Sequence[str] = (),
        nouns: Sequence[str] = (),
        texts: Sequence[str] = (),
    ) -> None:
        self.tokenizer, self.min_tokens, self.texts = tokenizer, min_tokens, texts
        self.names, self.nouns = names, nouns
        self.rng = random.Random(seed)
        self.generator = FactGenerator(seed, held_out=False)
        self.user, self.assistant, self.end = (self.encode(token)[0] for token in (USER, ASSISTANT, END))
        self._bit = {relation.name: 1 << index for index, relation in enumerate(RELATIONS)}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; every text starts as if after a space, so ids of sentences can be joined."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _name(self, relation: Relation) -> str | None:
        name = self.generator.name_for(relation)
        draw = self.rng.random()
        if name is not None and relation.subject == "person":
            if draw < 0.25:
                return self.rng.choice(FIRST_NAMES)
            if draw < 0.32 and self.names:
                return self.rng.choice(self.names)
        return name

    def _claim(self, relation: Relation, name: str | None) -> Claim:
        claim = self.generator.claim(relation, name)
        if self.nouns and self.rng.random() < UNUSUAL_SHARE:
            unusual = unusual_value(self.rng, relation.kind, self.names, self.nouns)
            return Claim(relation, name, unusual) if unusual else claim
        return claim

    def claims(self, shape: GroupShape) -> list[list[Claim]]:
        """The claims of each context of one group; none for a context of running English."""
        rng = self.rng
        relations: Sequence[Relation] = RELATIONS
        colliding = rng.random() < shape.colliding
        if colliding:
            relations = [r for r in rng.sample(RELATIONS, rng.randint(1, 3)) if r.subject != "none"] or [
                RELATIONS[0]
            ]
        used: set[tuple[str, str | None]] = set()
        names: list[str] = []
        group: list[list[Claim]] = []
        for _ in range(shape.contexts):
            earlier = [claim for context in group for claim in context]
            claims: list[Claim] = []
            group.append(claims)
            if self.texts and rng.random() < shape.running_text:
                continue
            same = rng.random() < 0.3
            for _ in range(rng.choices((1, 2, 3), shape.facts)[0]):
                old = rng.choice(earlier) if earlier and rng.random() < shape.changed else None
                if old and old.key not in {claim.key for claim in claims}:
                    claims.append(self._claim(old.relation, old.name))
                    continue
                while True:
                    relation = rng.choice(relations)
                    if self.nouns and not colliding and rng.random() < FREE_SHARE:
                        relation = free_relation(rng, self.nouns)
                    name = None
                    if relation.subject != "none" and not (
                        relation.has_first_person and rng.random() < shape.first_person
                    ):
                        name = self._name(relation)
                        if relation.subject == "person":
                            if same and claims and claims[0].name and claims[0].relation.subject == "person":
                                name = claims[0].name
                            elif names and rng.random() < 0.15:
                                name = rng.choice(names)
                    if (relation.name, name) not in used:
                        break
                    # A group of one relation may have run out of speakers or of the shared name: draw afresh.
                    same = False
                used.add((relation.name, name))
                if name is not None and relation.subject == "person":
                    names.append(name)
                claims.append(self._claim(relation, name))
        return group

    def _ask(self, claim: Claim, row: list[int], kinds: list[int], prefix: list[int]) -> None:
        rng = self.rng
        draw = rng.random()
        unfinished = claim.unfinished(rng) if draw > 0.85 else None
        answer = [*self.encode(claim.value), self.end]
        if unfinished is not None:
            asked = prefix + self.encode(unfinished)
        elif draw < 0.6:
            asked = [self.user, *prefix, *self.encode(self._question(claim)), self.assistant]
        else:
            asked = prefix + self.encode(self._question(claim))
        row += asked + answer
        kinds += [TEXT] * len(asked) + [ANSWER] * len(answer)

    def _statement(self, claims: Sequence[Claim]) -> str:
        """The statements of a context, as people type them."""
        rng = self.rng
        sentences = [claim.statement(rng) for claim in claims]
        if rng.random() < LEAD_IN_SHARE:
            sentences[0] = rng.choice(LEAD_INS) + without_capital(sentences[0])
        text = joined(sentences) if rng.random() < JOINED_SHARE else " ".join(sentences)
        return american(text) if rng.random() < AMERICAN_SHARE else text

    def _question(self, claim: Claim) -> str:
        """A question, now and then typed carelessly."""
        rng = self.rng
        text = claim.question(rng)
        if rng.random() < CARELESS_SHARE:
            text = text[0].lower() + text[1:] if rng.random() < 0.5 else text.rstrip("?.")
        return american(text) if rng.random() < AMERICAN_SHARE else text

    def _context(self, claims: Sequence[Claim]) -> list[int]:
        ids = self.encode(self._statement(claims))
        if self.rng.random() < CHAT_SHARE:
            return ([self.user, *ids] + self.encode(f"{ASSISTANT}Okay.{END}") * (self.rng.random() < 0.5))[
                :MAX_CONTEXT
            ]
        if len(ids) < self.min_tokens and self.rng.random() < 0.4:
            ids = ids * -(-self.min_tokens // len(ids))
        return ids[:MAX_CONTEXT]

    def _english(self) -> Example:
        ids = self.encode(self.rng.choice(self.texts))
        start = self.rng.randrange(max(1, len(ids) - 80))
        length = self.rng.randint(12, MAX_CONTEXT)
        context, row = ids[start : start + length], ids[start + length : start + length + 24]
        return Example(context, row, [NO_LOSS] + [TEXT] * (len(row) - 1), 0) if row else self._english()

    def group(self, shape: GroupShape) -> list[Example]:
        """Draw one group of `shape.contexts` examples."""
        rng = self.rng
        group = self.claims(shape)
        newest = {claim.key: claim for claims in group for claim in claims}
        every = list(newest.values())
        examples = []
        for claims in group:
            if not claims:
                examples.append(self._english())
                continue
            context = self._context(claims)
            valid = [claim for claim in claims if newest[claim.key] is claim]
            order = rng.sample(valid, min(2, len(valid))) or [rng.choice(every)]
            if len(order) < 2 and rng.random() < shape.cross:
                other = rng.choice(every)
                order += [other] if other is not order[0] else []
            row: list[int] = []
            kinds: list[int] = []
            prefix = context if rng.random() < shape.in_prompt else []
            for claim in order:
                self._ask(claim, row, kinds, [] if row else prefix)
            kinds[0] = NO_LOSS
            bits = 0
            for claim in claims:
                bits |= self._bit.get(claim.relation.name, 0) if claim.name is None else 0
            examples.append(Example(context, row, kinds, bits, claims))
        return examples


def batch_contexts(contexts: Sequence[Sequence[int]], min_tokens: int) -> tuple[Tensor, Tensor]:
    """Right-align contexts: ids int64 [B, Q] with Q >= min_tokens, lengths int64 [B]."""
    width = max(min_tokens, -(-max(len(c) for c in contexts) // 4) * 4)
    ids: NDArray[np.int64] = np.zeros((len(contexts), width), dtype=np.int64)
    for index, context in enumerate(contexts):
        ids[index, width - len(context) :] = context
    return torch.from_numpy(ids), torch.tensor([len(c) for c in contexts])


def batch_rows(
    rows: Sequence[Sequence[int]], kinds: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Left-align rows: ids and kinds, int64 [B, T], and lengths, int64 [B]."""
    width = -(-max(len(r) for r in rows) // 4) * 4
    both: NDArray[np.int64] = np.zeros((2, len(rows), width), dtype=np.int64)
    for index, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
        both[0, index, : len(row)] = row
        both[1, index, : len(kind)] = kind
    ids, labels = torch.from_numpy(both)
    return ids, labels, torch.tensor([len(r) for r in rows])
