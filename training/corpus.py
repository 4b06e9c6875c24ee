"""Groups of contexts for training: what is written into memory, and the rows that ask for it.

A group is G contexts that share a memory pool and are written in their order. A claim may change an earlier one of
the same relation and subject; then only the newest is asked for, so every question has one answer. In a colliding
group all claims come from one to three relations, so that only the name decides. Some questions are about what no
context of the pool tells; "I don't know" answers them.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from tokenizers import Tokenizer

from training.examples import ANSWER, NO_LOSS, TEXT, UNKNOWN, Example, Group, GroupShape, Key
from training.facts import Claim, FactGenerator
from training.relations import NEAR, RELATIONS, Relation
from training.tokenizer import ASSISTANT, END, USER
from training.variety import (
    CORRECTIONS,
    DETERMINERS,
    LEAD_INS,
    PLACE,
    QUESTION_LEAD_INS,
    american,
    free_action,
    free_place,
    free_relation,
    joined,
    sentence_of,
    somebody,
    terse,
    unusual_value,
    whereabouts,
    with_capital,
    without_capital,
    wrapped,
)
from training.words import COLOURS, FIRST_NAMES

DONT_KNOW = "I don't know"
MAX_CONTEXT = 64
CORRECTION_SHARE = 0.35  # contexts that change something and say that they do
LEAD_IN_SHARE = CARELESS_SHARE = 0.08
QUESTION_LEAD_IN_SHARE = 0.08
TERSE_SHARE = 0.12  # questions that lack some of the words that say little
WRAPPED_SHARE = 0.12  # questions asked in a roundabout way, where they can be
ROLE_SHARE = 0.07  # people without a name: "my sister"
PROSE_SHARE = 0.05  # contexts with a sentence of running text beside what they tell
UNTOLD_ASIDE_SHARE = 0.3  # rows of groups that are not written whose prompt tells what it asks for
CHAT_SHARE = 0.06  # contexts written as a chat message
JOINED_SHARE = 0.2  # contexts of several facts that are one sentence
AMERICAN_SHARE = 0.3
UNUSUAL_SHARE = 0.12  # values of any words
FULL_NAME_SHARE = 0.5  # values of one name that get a second: what is lost first in a crowd
FREE_SHARE = 0.12  # claims of a relation that any noun or verb may name


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
            if draw > 1 - ROLE_SHARE:
                return somebody(self.rng)
        return name

    def _free(self) -> Relation:
        """A relation that the fixed ones do not have."""
        draw = self.rng.random()
        if draw < 0.25:
            return free_action(self.rng)
        return (
            free_place(self.rng, self.nouns, COLOURS) if draw < 0.4 else free_relation(self.rng, self.nouns)
        )

    def _claim(self, relation: Relation, name: str | None) -> Claim:
        if relation.kind == PLACE:
            return Claim(relation, name, whereabouts(self.rng, self.nouns))
        claim = self.generator.claim(relation, name)
        if relation.kind == "person" and self.rng.random() < FULL_NAME_SHARE:
            while " " not in claim.value:
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
                        relation = self._free()
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

    def _unknown(self, told: Sequence[Claim], elsewhere: Collection[Key]) -> Claim:
        """A claim whose question nothing answers: half of them about a relation told of others, half about somebody of
        whom other things are told."""
        rng = self.rng
        keys = {claim.key for claim in told} | set(elsewhere)
        while True:
            relation = rng.choice(told).relation if told and rng.random() < 0.5 else rng.choice(RELATIONS)
            name = None
            if relation.subject != "none" and not (relation.has_first_person and rng.random() < 0.15):
                names = [
                    claim.name for claim in told if claim.name and claim.relation.subject == relation.subject
                ]
                name = rng.choice(names) if names and rng.random() < 0.5 else self._name(relation)
            near = NEAR.get(relation.name, frozenset({relation.name}))
            if not any(other in near and alike(name, someone) for other, someone in keys):
                return Claim(relation, name, DONT_KNOW)

    def _aside(self, keys: Collection[Key]) -> list[Claim]:
        """Claims that a prompt tells and no memory; `keys` is what memory speaks of."""
        while True:
            claims = self.claims(GroupShape(1, (0.7, 0.2, 0.1)))[0]
            if not any(claim.key in keys for claim in claims):
                return claims

    def _ask(self, claim: Claim, told_in: int, example: Example, prefix: list[int]) -> None:
        rng = self.rng
        draw = rng.random()
        unfinished = claim.unfinished(rng) if draw > 0.85 and claim.value != DONT_KNOW else None
        answer = [*self.encode(claim.value), self.end]
        if unfinished is not None:
            asked = prefix + self.encode(with_capital(unfinished))
        elif draw < 0.6:
            asked = [self.user, *prefix, *self.encode(self._question(claim)), self.assistant]
        else:
            asked = prefix + self.encode(self._question(claim))
        example.row += asked + answer
        kind = UNKNOWN if claim.value == DONT_KNOW else ANSWER
        example.kinds += [TEXT] * len(asked) + [kind] * len(answer)
        example.told_in += [-1] * len(asked) + [told_in] * len(answer)

    def _statement(self, claims: Sequence[Claim], corrects: bool) -> str:
        """The statements of a context, as people type them; the first of them `corrects` an earlier one."""
        rng = self.rng
        sentences = [with_capital(claim.statement(rng)) for claim in claims]
        if corrects and rng.random() < CORRECTION_SHARE:
            sentences[0] = rng.choice(CORRECTIONS) + without_capital(sentences[0])
        elif rng.random() < LEAD_IN_SHARE:
            sentences[0] = rng.choice(LEAD_INS) + without_capital(sentences[0])
        text = joined(sentences) if rng.random() < JOINED_SHARE else " ".join(sentences)
        return american(text) if rng.random() < AMERICAN_SHARE else text

    def _question(self, claim: Claim) -> str:
        """A question, now and then typed carelessly."""
        rng = self.rng
        text = with_capital(claim.question(rng))
        draw = rng.random()
        if draw < TERSE_SHARE:
            text = terse(rng, text)
        elif draw < TERSE_SHARE + WRAPPED_SHARE:
            text = wrapped(rng, text)
        if rng.random() < QUESTION_LEAD_IN_SHARE:
            text = rng.choice(QUESTION_LEAD_INS) + text[0].lower() + text[1:]
        if rng.random() < CARELESS_SHARE:
            text = text[0].lower() + text[1:] if rng.random() < 0.5 else text.rstrip("?.")
        return american(text) if rng.random() < AMERICAN_SHARE else text

    def _context(self, claims: list[Claim], corrects: bool) -> list[int]:
        """The tokens of a context. Claims that do not fit into it are taken out of `claims`, the last ones first."""
        ids = self.encode(self._statement(claims, corrects))
        while len(ids) > MAX_CONTEXT and len(claims) > 1:
            claims.pop()
            ids = self.encode(self._statement(claims, corrects))
        if self.texts and self.rng.random() < PROSE_SHARE:
            ids = self._in_prose(ids)
        if self.rng.random() < CHAT_SHARE:
            return ([self.user, *ids] + self.encode(f"{ASSISTANT}Okay.{END}") * (self.rng.random() < 0.5))[
                :MAX_CONTEXT
            ]
        if len(ids) < self.min_tokens and self.rng.random() < 0.4:
            ids = ids * -(-self.min_tokens // len(ids))
        return ids[:MAX_CONTEXT]

    def _in_prose(self, ids: list[int]) -> list[int]:
        """The tokens of a context, with a sentence of running text before or after them if both fit into one."""
        drawn = sentence_of(self.rng, self.rng.choice(self.texts))
        prose = self.encode(drawn) if drawn else []
        if len(ids) + len(prose) > MAX_CONTEXT:
            return ids
        return prose + ids if self.rng.random() < 0.5 else ids + prose

    def _english(self) -> Example:
        ids = self.encode(self.rng.choice(self.texts))
        start = self.rng.randrange(max(1, len(ids) - 80))
        length = self.rng.randint(12, MAX_CONTEXT)
        context, row = ids[start : start + length], ids[start + length : start + length + 24]
        kinds = [NO_LOSS] + [TEXT] * (len(row) - 1)
        return Example(context, row, kinds, [-1] * len(row)) if row else self._english()

    def group(self, shape: GroupShape, elsewhere: Collection[Key] = ()) -> Group:
        """Draw one group of `shape.contexts` examples; `elsewhere` is what other blocks of its pool speak of."""
        rng = self.rng
        told = rng.random() >= shape.untold
        group = self.claims(shape)
        contexts: list[list[int]] = []
        earlier: set[Key] = set()
        for claims in group:
            corrects = bool(claims) and claims[0].key in earlier
            contexts.append(self._context(claims, corrects) if claims else [])
            earlier |= {claim.key for claim in claims}
        newest = {claim.key: (index, claim) for index, claims in enumerate(group) for claim in claims}
        every = list(newest.values())
        examples = []
        for index, claims in enumerate(group):
            if not claims:
                examples.append(self._english())
                continue
            example = Example(contexts[index], [], [], [], claims)
            valid = [(index, claim) for claim in claims if newest[claim.key][1] is claim]
            order = rng.sample(valid, min(2, len(valid))) or [rng.choice(every)]
            if len(order) < 2 and rng.random() < shape.cross:
                other = rng.choice(every)
                order += [other] if other[1] is not order[0][1] else []
            known = [claim for _, claim in every]
            if not told:
                order = [(-1, self._unknown([], [])) for _ in order]
            elif rng.random() < shape.unknown:
                order = [(-1, self._unknown(known, elsewhere)), order[0]]
                rng.shuffle(order)
            prefix: list[int] = []
            draw = rng.random()
            if told and draw < shape.in_prompt / 2:
                prefix = contexts[index]
            elif draw < (shape.in_prompt if told else UNTOLD_ASIDE_SHARE):
                aside = self._aside({claim.key for claim in known} | set(elsewhere))
                prefix = self.encode(self._statement(aside, False))[:MAX_CONTEXT]
                order = [(-1, aside[0]), order[0]]
            for told_in, claim in order:
                self._ask(claim, told_in, example, [] if example.row else prefix)
            example.kinds[0] = NO_LOSS
            examples.append(example)
        return Group(examples, told)


def alike(one: str | None, other: str | None) -> bool:
    """Whether two names may mean the same person, such as Anna and Anna Tolvan, or our boss and the boss."""
    if one is None or other is None:
        return one is other
    return bool((set(one.split()) & set(other.split())) - DETERMINERS)
