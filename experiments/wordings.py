"""Questions in words that the pocket model's training never uses (a test compares them with its templates)."""

from __future__ import annotations

import random

from training.facts import Fact
from training.relations import word_it

# [third person|first person]; {n} is the subject's name
UNSEEN: dict[str, tuple[str, ...]] = {
    "home": ("Could you say which place [{n} calls|I call] home?", "[{n} lives|I live] in which place?"),
    "birthplace": ("Which place [was {n}|was I] born in?", "Could you name the place of [{n}'s|my] birth?"),
    "job": ("Which profession [does {n}|do I] have?", "How [does {n}|do I] earn money?"),
    "employer": ("Which firm [does {n}|do I] work for?", "Who pays [{n}'s|my] salary?"),
    "favourite food": ("Which food [does {n}|do I] like best?", "[{n}'s|My] favourite food is what?"),
    "allergy": ("Which food must [{n}|I] avoid?", "Which food makes [{n}|me] ill?"),
    "favourite drink": ("Which drink [does {n}|do I] like best?", "[{n}'s|My] favourite drink is what?"),
    "favourite colour": ("Which colour [does {n}|do I] prefer?", "[{n}'s|My] favourite colour is which one?"),
    "dog": ("Which name [does {n}'s|does my] dog have?", "How is [{n}'s|my] dog called?"),
    "cat": ("Which name [does {n}'s|does my] cat have?", "How is [{n}'s|my] cat called?"),
    "horse": ("Which name [does {n}'s|does my] horse have?", "How is [{n}'s|my] horse called?"),
    "parrot": ("Which name [does {n}'s|does my] parrot have?", "How is [{n}'s|my] parrot called?"),
    "boat": ("Which name [does {n}'s|does my] boat have?", "How is [{n}'s|my] boat called?"),
    "wife": ("How is [{n}'s|my] wife called?", "Could you name [{n}'s|my] wife?"),
    "husband": ("Could you name [{n}'s|my] husband?", "How is [{n}'s|my] husband called?"),
    "sister": ("Could you name [{n}'s|my] sister?", "How is [{n}'s|my] sister called?"),
    "brother": ("Could you name [{n}'s|my] brother?", "How is [{n}'s|my] brother called?"),
    "boss": ("Could you name [{n}'s|my] boss?", "How is [{n}'s|my] boss called?"),
    "teacher": ("Could you name [{n}'s|my] teacher?", "How is [{n}'s|my] teacher called?"),
    "neighbour": ("Could you name [{n}'s|my] neighbour?", "How is [{n}'s|my] neighbour called?"),
    "daughter": ("Could you name [{n}'s|my] daughter?", "How is [{n}'s|my] daughter called?"),
    "son": ("Could you name [{n}'s|my] son?", "How is [{n}'s|my] son called?"),
    "birthday": ("Which date is [{n}'s|my] birthday?", "[{n}'s|My] birthday falls on which day?"),
    "age": ("How many years old [is {n}|am I]?", "Which age [has {n}|have I] reached?"),
    "phone number": ("Which phone number [does {n}|do I] have?", "How can [{n}|I] be reached by phone?"),
    "password": ("Could you remind me of [{n}'s|my] password?", "[{n}'s|My] password is which word?"),
    "meeting": ("Which time is [{n}'s|my] meeting?", "[{n}'s|My] meeting begins when?"),
    "train": ("Which time is [{n}'s|my] train?", "[{n}'s|My] train goes when?"),
    "hobby": ("How [does {n}|do I] spend free time?", "Which hobby [does {n}|do I] have?"),
    "instrument": ("Which musical instrument is [{n}'s|mine]?", "On what [does {n}|do I] make music?"),
    "car": ("Which make of car [does {n}|do I] own?", "[{n}'s|My] car is of which make?"),
    "school": ("Which school did [{n}|I] attend?", "Which school taught [{n}|me]?"),
}
UNSEEN |= {
    noun: (f"Could you name [{{n}}'s|my] {noun}?", f"How is [{{n}}'s|my] {noun} called?")
    for noun in ("best friend", "doctor", "mother", "father", "aunt", "uncle", "cousin", "grandmother", "grandfather",
                 "lawyer", "landlord", "coach", "colleague", "roommate", "hairdresser")
} | {
    noun: (f"Which name [does {{n}}'s|does my] {noun} have?", f"How is [{{n}}'s|my] {noun} called?")
    for noun in ("rabbit", "hamster", "tortoise", "pony")
} | {
    noun: (f"Could you say what [{{n}}'s|my] {noun} is?", f"[{{n}}'s|My] {noun} is which?")
    for noun in ("door code", "ticket number", "PIN", "passport number", "number plate", "account number",
                 "order number", "username", "seat", "favourite film", "favourite song", "favourite game", "nickname",
                 "middle name")
}  # fmt: skip


def asked_anew(fact: Fact, draw: random.Random) -> str | None:
    """The fact's question in an unseen wording; None where there is none for its relation."""
    templates = UNSEEN.get(fact.relation)
    return word_it(draw.choice(templates), fact.subject) if templates else None
