"""What a relation is, and the wordings that several relations share.

A template's `[third|first]` holds the wording about somebody else and the wording about the speaker; `{n}` is the
subject's name and `{v}` the value. A statement that ends in `{v}.` also gives an unfinished sentence to complete.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_BRACKET = re.compile(r"\[([^|\]]*)\|([^\]]*)\]")


@dataclass(frozen=True)
class Relation:
    """One relation; `subject` is "person", "word" (a thing with a spelled name) or "none" (the only one there is)."""

    name: str
    kind: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    subject: str = "person"

    @property
    def has_first_person(self) -> bool:
        """Whether the speaker can say it of themselves."""
        return self.subject == "person"


def word_it(template: str, name: str | None) -> str:
    """Choose the third-person wording for `name`, or the first-person one if it is None; `{v}` stays."""
    text = _BRACKET.sub(lambda match: match.group(2 if name is None else 1), template)
    return text if name is None else text.replace("{n}", name)


def with_article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' and not noun.startswith(('uni', 'use')) else 'a'} {noun}"


def _said(noun: str) -> tuple[str, ...]:
    return (
        f"[{{n}}'s|My] {noun} is {{v}}.",
        f"[The {noun} of {{n}}|My own {noun}] is {{v}}.",
        f"As for [{{n}}'s|my] {noun}, it is {{v}}.",
        f"For [{{n}}|me] the {noun} is {{v}}.",
        f"[{{n}}'s|My] {noun}: {{v}}.",
    )


def _asked(noun: str) -> tuple[str, ...]:
    return (
        f"What is [{{n}}'s|my] {noun}?",
        f"What's [{{n}}'s|my] {noun}?",
        f"Tell me [{{n}}'s|my] {noun}.",
        f"What was [{{n}}'s|my] {noun} again?",
        f"Do you know [{{n}}'s|my] {noun}?",
    )


def own(
    name: str, kind: str, statements: Sequence[str], questions: Sequence[str], noun: str | None = None
) -> Relation:
    """A relation with a `noun` (its name unless one is given): "X's noun is V" in several wordings, and its own."""
    noun = noun or name
    return Relation(name, kind, (*statements, *_said(noun)), (*questions, *_asked(noun)))


def named(noun: str) -> Relation:
    """An animal or a thing that somebody has and calls by a name."""
    a_noun = with_article(noun)
    return Relation(
        noun,
        "word",
        (f"[{{n}}'s|My] {noun} is called {{v}}.", f"[{{n}} has|I have] {a_noun} called {{v}}.",
         f"[{{n}}'s|My] {noun} is named {{v}}.", f"The name of [{{n}}'s|my] {noun} is {{v}}.",
         f"[{{n}} has|I have] {a_noun} and its name is {{v}}.", f"[{{n}} named the|I named my] {noun} {{v}}.",
         f"{{v}} is the name of [{{n}}'s|my] {noun}."),
        (f"What is [{{n}}'s|my] {noun} called?", f"What's [{{n}}'s|my] {noun}'s name?",
         f"What is the name of [{{n}}'s|my] {noun}?", f"What is [{{n}}'s|my] {noun}'s name?",
         f"Tell me the name of [{{n}}'s|my] {noun}.", f"What did [{{n}} name the|I name my] {noun}?",
         f"Do you know what [{{n}}'s|my] {noun} is called?"),
    )  # fmt: skip


def kin(noun: str) -> Relation:
    """Somebody who is the subject's `noun`."""
    a_noun = with_article(noun)
    return Relation(
        noun,
        "person",
        (f"[{{n}}'s|My] {noun} is {{v}}.", f"[{{n}}'s|My] {noun} is called {{v}}.",
         f"[{{n}} has|I have] {a_noun} called {{v}}.", f"{{v}} is [{{n}}'s|my] {noun}.",
         f"The name of [{{n}}'s|my] {noun} is {{v}}.", f"[{{n}}'s|My] {noun} is named {{v}}.",
         f"{{v}} is the name of [{{n}}'s|my] {noun}."),
        (f"Who is [{{n}}'s|my] {noun}?", f"What is [{{n}}'s|my] {noun} called?",
         f"What is the name of [{{n}}'s|my] {noun}?", f"What's [{{n}}'s|my] {noun}'s name?",
         f"Who's [{{n}}'s|my] {noun}?", f"Tell me the name of [{{n}}'s|my] {noun}.",
         f"Do you know who [{{n}}'s|my] {noun} is?"),
    )  # fmt: skip
