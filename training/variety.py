"""What people type that the fixed wordings do not cover: other spellings, joined sentences, relations and values made
of any words. Only training uses it; evaluations stay on the fixed relations."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from training.relations import Relation

LEAD_INS = (
    "Please remember: ",
    "Note: ",
    "By the way, ",
    "I heard that ",
    "Remember that ",
    "Did you know? ",
    "FYI, ",
    "Just so you know, ",
    "For the record: ",
    "Keep in mind that ",
    "You should know that ",
    "One more thing: ",
    "Hey, ",
)
QUESTION_LEAD_INS = (
    "Quick question: ",
    "By the way, ",
    "Remind me, ",
    "Hi! ",
    "Please tell me, ",
    "I forgot: ",
    "And ",
    "So ",
)
CORRECTIONS = (
    "Actually ",
    "Actually, ",
    "Correction: ",
    "I was wrong: ",
    "Sorry, ",
    "No, ",
    "It has changed: ",
    "From now on ",
)
LITTLE_WORDS = frozenset((
    "a", "an", "the", "is", "are", "was", "were", "does", "do", "did", "has", "have", "of", "in", "on", "at", "to",
    "for", "tell", "me", "you", "know", "can", "could", "say",
))  # fmt: skip
OUR_FIRST_WORDS = (
    "My ", "The ", "Our ", "We ", "In ", "A ", "As ", "For ", "Every ", "Everybody ", "Everything ", "Friends ", "Of ",
    "On ", "To ", "You ", "Between ", "From ", "Online ", "One ", "They ", "Call ", "People ", "There ",
)  # fmt: skip
# who people speak of without a name
ROLES = (
    "sister", "brother", "wife", "husband", "mother", "father", "son", "daughter", "aunt", "uncle", "cousin", "nephew",
    "niece", "grandmother", "grandfather", "boss", "manager", "colleague", "assistant", "neighbour", "landlord",
    "doctor", "dentist", "lawyer", "coach", "teacher", "friend", "best friend", "girlfriend", "boyfriend", "partner",
    "roommate", "client", "guest", "trainer", "hairdresser",
)  # fmt: skip
DETERMINERS = frozenset(("my", "our", "the"))
ASKED = re.compile(r"(What is|What's|What was|Who is|Who's|Tell me) ((?:(?! called).)+?)(?: again)?[?.]")
# {r} is what is asked for, such as "Anna's dentist", and {w} who or what
WRAPPERS = (
    "{r}?", "{r}, please?", "Can you tell me {r}?", "Do you remember {r}?", "Do you remember {w} {r} is?",
    "I would like to know {r}.", "I need to know {w} {r} is.", "Please look up {r}.", "Give me {r}.",
    "What did I say about {r}?", "Any idea {w} {r} is?", "Do you happen to know {r}?", "I can't remember {r}.",
    "Have you got {r}?", "Let me know {w} {r} is.", "I wonder {w} {r} is.", "Have I told you {w} {r} is?",
)  # fmt: skip
FREE_KINDS = ("word", "word", "person", "number", "code", "time", "company")


def without_capital(sentence: str) -> str:
    """The sentence as it stands inside another: names, values and "I" keep their capital."""
    return sentence[0].lower() + sentence[1:] if sentence.startswith(OUR_FIRST_WORDS) else sentence


def with_capital(sentence: str) -> str:
    """The sentence as it stands alone, even where it begins with somebody who has no name."""
    return sentence[0].upper() + sentence[1:]


def somebody(rng: random.Random) -> str:
    """Somebody without a name: "my sister"."""
    return f"{rng.choice(('my', 'my', 'my', 'our', 'the'))} {rng.choice(ROLES)}"


def wrapped(rng: random.Random, question: str) -> str:
    """The question asked in a roundabout way, if it names what it asks for: "Who is X?", "What's X?", "Tell me X.\""""
    asked = ASKED.fullmatch(question)
    if asked is None:
        return question
    word = "who" if asked[1].startswith("Who") else "what"
    return with_capital(rng.choice(WRAPPERS).format(r=asked[2], w=word))


def sentence_of(rng: random.Random, text: str) -> str | None:
    """A sentence of running text, 4 to 16 words long; None if the drawn one is not."""
    drawn = rng.choice(text.split(". "))
    return drawn.removesuffix(".") + "." if 4 <= len(drawn.split(" ")) <= 16 else None


def american(text: str) -> str:
    """American spelling."""
    return text.replace("favourite", "favorite").replace("colour", "color").replace("neighbour", "neighbor")


def joined(sentences: Sequence[str]) -> str:
    """Several sentences as one, with "and"."""
    rest = [without_capital(sentence) for sentence in sentences[1:]]
    return " and ".join(sentence.removesuffix(".") for sentence in [sentences[0], *rest]) + "."


def terse(rng: random.Random, question: str) -> str:
    """The question without some of the words that say little, so that what it is about is found by what is left."""
    words = question.split(" ")
    kept = [word for word in words if word.lower() not in LITTLE_WORDS or rng.random() < 0.4]
    return " ".join(kept) if len(kept) > 2 else question


def free_relation(rng: random.Random, nouns: Sequence[str]) -> Relation:
    """A relation that any noun could name: "Anna's harvest is Tolvan"."""
    noun = rng.choice(nouns)
    if rng.random() < 0.3:
        noun = f"{noun} {rng.choice(nouns)}"
    subject = rng.choice(("person", "person", "none"))
    if subject == "none":
        statements = (f"The {noun} is {{v}}.", f"Our {noun} is {{v}}.", f"The {noun} is called {{v}}.")
        questions = (f"What is the {noun}?", f"What's the {noun}?", f"Tell me the {noun}.")
    else:
        statements = (f"[{{n}}'s|My] {noun} is {{v}}.", f"[{{n}} has|I have] a {noun} called {{v}}.",
                      f"[The {noun} of {{n}}|My {noun}] is {{v}}.")  # fmt: skip
        questions = (f"What is [{{n}}'s|my] {noun}?", f"What is [{{n}}'s|my] {noun} called?",
                     f"Who is [{{n}}'s|my] {noun}?")  # fmt: skip
    return Relation(f"free {noun}", rng.choice(FREE_KINDS), statements, questions, subject)


def unusual_value(rng: random.Random, kind: str, names: Sequence[str], nouns: Sequence[str]) -> str | None:
    """A value made of any words, such as Kingdom Rivers, software engineer or hunter2; None for kinds of numbers."""
    if kind in ("word", "company"):
        if rng.random() < 0.2:
            return f"{rng.choice(nouns)}{rng.randint(1, 99)}"
        return " ".join(rng.sample(names, rng.choice((1, 1, 2))))
    if kind in ("food", "job", "hobby", "drink", "colour", "animal"):
        return " ".join(rng.sample(nouns, rng.choice((1, 2))))
    return None
