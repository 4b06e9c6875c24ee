"""The relations facts are about, and how they are said and asked.

A template's `[third|first]` holds the wording about somebody else and the wording about the speaker; `{n}` is the
subject's name and `{v}` the value. A statement that ends in `{v}.` also gives an unfinished sentence to complete.
"""

from __future__ import annotations

import re
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


def _own(name: str, kind: str, noun: str, *more: tuple[tuple[str, ...], tuple[str, ...]]) -> Relation:
    """A relation said as "X's noun is V", with extra (statements, questions) wordings."""
    statements = [f"[{{n}}'s|My] {noun} is {{v}}.", f"[The {noun} of {{n}}|My {noun}] is {{v}}."]
    questions = [
        f"What is [{{n}}'s|my] {noun}?",
        f"What's [{{n}}'s|my] {noun}?",
        f"Tell me [{{n}}'s|my] {noun}.",
    ]
    for extra_statements, extra_questions in more:
        statements += extra_statements
        questions += extra_questions
    return Relation(name, kind, tuple(statements), tuple(questions))


def _pet(animal: str) -> Relation:
    return Relation(
        animal,
        "word",
        (f"[{{n}}'s|My] {animal} is called {{v}}.", f"[{{n}} has|I have] a {animal} called {{v}}.",
         f"[{{n}}'s|My] {animal} is named {{v}}.", f"The name of [{{n}}'s|my] {animal} is {{v}}."),
        (f"What is [{{n}}'s|my] {animal} called?", f"What's [{{n}}'s|my] {animal}'s name?",
         f"What is the name of [{{n}}'s|my] {animal}?", f"What is [{{n}}'s|my] {animal}'s name?"),
    )  # fmt: skip


def _kin(noun: str) -> Relation:
    return Relation(
        noun,
        "person",
        (f"[{{n}}'s|My] {noun} is {{v}}.", f"[{{n}}'s|My] {noun} is called {{v}}.",
         f"[{{n}} has|I have] a {noun} called {{v}}.", f"{{v}} is [{{n}}'s|my] {noun}."),
        (f"Who is [{{n}}'s|my] {noun}?", f"What is [{{n}}'s|my] {noun} called?",
         f"What is the name of [{{n}}'s|my] {noun}?", f"What's [{{n}}'s|my] {noun}'s name?"),
    )  # fmt: skip


RELATIONS: tuple[Relation, ...] = (
    Relation("home", "word",
             ("[{n} lives|I live] in {v}.", "[{n}'s|My] home is in {v}.", "[{n} has|I have] a house in {v}.",
              "[{n} moved|I moved] to {v}."),
             ("Where [does {n}|do I] live?", "In which town [does {n}|do I] live?",
              "Where is [{n}'s|my] home?",
              "What town [does {n}|do I] live in?")),
    Relation("birthplace", "word",
             ("[{n} was|I was] born in {v}.", "[{n}'s|My] birthplace is {v}.",
              "[{n} comes|I come] from {v}."),
             ("Where [was {n}|was I] born?", "What is [{n}'s|my] birthplace?",
              "Where [does {n}|do I] come from?")),
    Relation("job", "job",
             ("[{n} works|I work] as a {v}.", "[{n}'s|My] job is {v}.",
              "[{n} earns|I earn] a living as a {v}."),
             ("What [does {n}|do I] work as?", "What is [{n}'s|my] job?",
              "What [does {n}|do I] do for a living?")),
    Relation("employer", "company",
             ("[{n} works|I work] at {v}.", "[{n}'s|My] employer is {v}.", "[{n} has|I have] a job at {v}."),
             ("Where [does {n}|do I] work?", "Who is [{n}'s|my] employer?",
              "At which company [does {n}|do I] work?")),
    _own("favourite food", "food", "favourite food",
         (("[{n} loves|I love] to eat {v}.",), ("What [does {n}|do I] love to eat?",))),
    Relation("allergy", "food",
             ("[{n} is|I am] allergic to {v}.", "[{n}'s|My] allergy is to {v}."),
             ("What [is {n}|am I] allergic to?", "What is [{n}'s|my] allergy?",
              "To what [is {n}|am I] allergic?")),
    _own("favourite drink", "drink", "favourite drink",
         (("[{n} likes|I like] to drink {v}.",), ("What [does {n}|do I] like to drink?",))),
    _own("favourite colour", "colour", "favourite colour",
         (("[{n} likes|I like] the colour {v}.",), ("Which colour [does {n}|do I] like?",))),
    _own("favourite animals", "animal", "favourite animal",
         (("[{n} is|I am] fond of {v}.",), ("Which animals [is {n}|am I] fond of?",))),
    _pet("dog"), _pet("cat"), _pet("horse"), _pet("parrot"), _pet("boat"),
    _kin("wife"), _kin("husband"), _kin("sister"), _kin("brother"), _kin("best friend"), _kin("boss"),
    _kin("doctor"), _kin("teacher"), _kin("neighbour"), _kin("son"), _kin("daughter"),
    Relation("birthday", "date",
             ("[{n}'s|My] birthday is on {v}.", "[{n}'s|My] birthday is {v}.",
              "[{n} celebrates|I celebrate] on {v}."),
             ("When is [{n}'s|my] birthday?", "What is [{n}'s|my] birthday?",
              "On which day is [{n}'s|my] birthday?")),
    Relation("age", "age",
             ("[{n} is|I am] {v} years old.", "[{n}'s|My] age is {v}."),
             ("How old [is {n}|am I]?", "What is [{n}'s|my] age?")),
    _own("phone number", "phone", "phone number",
         (("[{n} can|I can] be called at {v}.",), ("At what number can [{n}|I] be called?",))),
    _own("door code", "code", "door code",
         (("[{n}'s|My] door opens with {v}.",), ("Which code opens [{n}'s|my] door?",))),
    _own("password", "word", "password",
         (("[{n} uses|I use] the password {v}.",), ("Which password [does {n}|do I] use?",))),
    _own("ticket number", "code", "ticket number",
         (("[{n} has|I have] ticket number {v}.",), ("Which ticket number [does {n}|do I] have?",))),
    Relation("meeting", "time",
             ("[{n} has|I have] a meeting at {v}.", "[{n}'s|My] meeting is at {v}.",
              "[{n}'s|My] meeting starts at {v}."),
             ("When is [{n}'s|my] meeting?", "At what time is [{n}'s|my] meeting?",
              "What time does [{n}'s|my] meeting start?")),
    Relation("train", "time",
             ("[{n} takes|I take] the train at {v}.", "[{n}'s|My] train leaves at {v}."),
             ("When [does {n}|do I] take the train?", "When does [{n}'s|my] train leave?",
              "What time does [{n}'s|my] train leave?")),
    Relation("appointment", "weekday",
             ("[{n} sees|I see] the dentist on {v}.", "[{n}'s|My] dentist appointment is on {v}."),
             ("When [does {n}|do I] see the dentist?", "When is [{n}'s|my] dentist appointment?")),
    Relation("hobby", "hobby",
             ("[{n} enjoys|I enjoy] {v}.", "[{n}'s|My] hobby is {v}.",
              "In the evening [{n} likes|I like] {v}."),
             ("What [does {n}|do I] enjoy?", "What is [{n}'s|my] hobby?", "What's [{n}'s|my] hobby?")),
    Relation("instrument", "instrument",
             ("[{n} plays|I play] the {v}.", "[{n}'s|My] instrument is the {v}.",
              "[{n} practises|I practise] the {v}."),
             ("What [does {n}|do I] play?", "What is [{n}'s|my] instrument?",
              "Which instrument [does {n}|do I] play?")),
    Relation("car", "word",
             ("[{n} drives|I drive] a {v}.", "[{n}'s|My] car is a {v}.", "[{n} bought|I bought] a {v} car."),
             ("What [does {n}|do I] drive?", "Which car [does {n}|do I] drive?", "What is [{n}'s|my] car?")),
    Relation("language", "language",
             ("[{n} speaks|I speak] {v}.", "[{n} is|I am] learning {v}.",
              "[{n}'s|My] native language is {v}."),
             ("Which language [does {n}|do I] speak?", "What language [does {n}|do I] speak?",
              "What is [{n}'s|my] language?")),
    Relation("school", "word",
             ("[{n} studied|I studied] at {v}.", "[{n}'s|My] school is {v}.",
              "[{n} went|I went] to school at {v}."),
             ("Where did [{n}|I] study?", "What is [{n}'s|my] school?", "Where did [{n}|I] go to school?")),
    Relation("team", "word",
             ("[{n} supports|I support] {v}.", "[{n}'s|My] team is {v}.", "[{n} is|I am] a fan of {v}."),
             ("Which team [does {n}|do I] support?", "What is [{n}'s|my] team?",
              "Who [does {n}|do I] support?")),
    Relation("book", "word",
             ("[{n} is|I am] reading {v}.", "[{n}'s|My] favourite book is {v}.",
              "[{n} wrote|I wrote] a book called {v}."),
             ("What [is {n}|am I] reading?", "Which book [is {n}|am I] reading?",
              "What is [{n}'s|my] book?")),
    Relation("room", "number",
             ("[{n} sleeps|I sleep] in room {v}.", "[{n}'s|My] room is {v}.",
              "[{n}'s|My] room number is {v}."),
             ("In which room [does {n}|do I] sleep?", "What is [{n}'s|my] room number?",
              "Which room is [{n}'s|mine]?")),
    Relation("holiday", "word",
             ("[{n} is|I am] going to {v} this summer.", "[{n} spends|I spend] the holidays in {v}.",
              "[{n}'s|My] next trip is to {v}."),
             ("Where [is {n}|am I] going this summer?", "Where [does {n}|do I] spend the holidays?",
              "Where is [{n}'s|my] next trip to?")),
    Relation("street", "word",
             ("[{n}'s|My] street is {v} Street.", "[{n} lives|I live] on {v} Street.",
              "[{n}'s|My] office is on {v} Street."),
             ("On which street [does {n}|do I] live?", "What is [{n}'s|my] street?",
              "What street [is {n}|am I] on?")),
    Relation("capital", "word",
             ("The capital of {n} is {v}.", "{v} is the capital of {n}.", "{n}'s capital is {v}."),
             ("What is the capital of {n}?", "What is {n}'s capital?",
              "Which city is the capital of {n}?"), "word"),
    Relation("leader", "person",
             ("{n} is led by {v}.", "The head of {n} is {v}.", "{v} runs {n}."),
             ("Who leads {n}?", "Who is the head of {n}?", "Who runs {n}?"), "word"),
    Relation("founded", "year",
             ("{n} was founded in {v}.", "The year {n} was founded is {v}."),
             ("When was {n} founded?", "In which year was {n} founded?"), "word"),
    Relation("price", "number",
             ("A {n} costs {v} dollars.", "The price of a {n} is {v} dollars."),
             ("How many dollars does a {n} cost?", "What is the price of a {n}?",
              "How much does a {n} cost?"), "word"),
    Relation("inventor", "person",
             ("{n} was invented by {v}.", "{v} invented {n}.", "The inventor of {n} is {v}."),
             ("Who invented {n}?", "Who is the inventor of {n}?", "By whom was {n} invented?"), "word"),
    Relation("wifi", "code",
             ("The wifi password is {v}.", "The code for the wifi is {v}.", "Our wifi password is {v}."),
             ("What is the wifi password?", "What's the wifi password?",
              "What is the code for the wifi?"), "none"),
    Relation("key", "word",
             ("The key is at {v}.", "The spare key is in {v}.", "We keep the key at {v}."),
             ("Where is the key?", "Where is the spare key?", "Where do we keep the key?"), "none"),
    Relation("project", "word",
             ("The project is called {v}.", "Our project's name is {v}.", "We named the project {v}."),
             ("What is the project called?", "What is our project's name?",
              "What's the name of the project?"), "none"),
)  # fmt: skip

OPEN_KINDS = frozenset({"word", "person", "company", "time", "date", "number", "year", "phone", "code"})
