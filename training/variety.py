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
# what people do to things, and to each other
DOING = (
    "teach", "repair", "sell", "collect", "study", "paint", "write", "breed", "translate", "build", "grow", "rent",
    "manage", "design", "bake", "research", "import", "restore", "train", "cook",
)  # fmt: skip
HELPING = (
    "coach", "train", "teach", "supervise", "mentor", "employ", "represent", "advise", "assist", "replace", "support",
    "examine", "interview", "tutor",
)  # fmt: skip
PLACES = ("under", "behind", "near", "in", "on", "next to", "above", "inside")
STREETS = ("Street", "Road", "Lane", "Avenue", "Square", "Hill", "Court", "Way")
PLACE = "place"


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


def _does(verb: str) -> str:
    if verb.endswith("dy"):
        return verb.removesuffix("y") + "ies"
    return verb + ("es" if verb.endswith("ch") else "s")


def free_action(rng: random.Random) -> Relation:
    """A relation that a verb names: "Anna repairs Tolvan", "Leo coaches Anna"."""
    if rng.random() < 0.5:
        verb = rng.choice(DOING)
        statements = (f"[{{n}} {_does(verb)}|I {verb}] {{v}}.", f"[{{n}} likes|I like] to {verb} {{v}}.",
                      f"What [{{n}} {_does(verb)}|I {verb}] is {{v}}.")  # fmt: skip
        questions = (f"What [does {{n}}|do I] {verb}?", f"What is it that [{{n}} {_does(verb)}|I {verb}]?",
                     f"What [does {{n}}|do I] like to {verb}?")  # fmt: skip
        return Relation(f"what they {verb}", rng.choice(("word", "food", "animal")), statements, questions)
    verb = rng.choice(HELPING)
    statements = (f"{{v}} {_does(verb)} [{{n}}|me].", f"The person who {_does(verb)} [{{n}}|me] is {{v}}.",
                  f"It is {{v}} who {_does(verb)} [{{n}}|me].")  # fmt: skip
    asked = (f"Who {_does(verb)} [{{n}}|me]?", f"Who is it that {_does(verb)} [{{n}}|me]?")
    return Relation(f"who {_does(verb)} them", "person", statements, asked)


def free_place(rng: random.Random, nouns: Sequence[str], colours: Sequence[str]) -> Relation:
    """Where some thing is: "The red folder is under the stairs"."""
    noun = rng.choice(nouns)
    if rng.random() < 0.4:
        noun = f"{rng.choice(colours)} {noun}"
    statements = (f"The {noun} is {{v}}.", f"I put the {noun} {{v}}.", f"We keep the {noun} {{v}}.",
                  f"You can find the {noun} {{v}}.", f"The {noun} lies {{v}}.")  # fmt: skip
    questions = (f"Where is the {noun}?", f"Where did I put the {noun}?", f"Where do we keep the {noun}?",
                 f"Where can I find the {noun}?", f"Where's the {noun}?")  # fmt: skip
    return Relation(f"place of the {noun}", PLACE, statements, questions, "none")


def whereabouts(rng: random.Random, nouns: Sequence[str]) -> str:
    """Where a thing may be: "under the stairs", "in harvest 7"."""
    if rng.random() < 0.2:
        return f"in {rng.choice(nouns)} {rng.randint(1, 40)}"
    return f"{rng.choice(PLACES)} the {rng.choice(nouns)}"


def unusual_value(rng: random.Random, kind: str, names: Sequence[str], nouns: Sequence[str]) -> str | None:
    """A value made of any words, such as Kingdom Rivers, software engineer or hunter2; None for kinds of numbers."""
    if kind in ("word", "company"):
        if rng.random() < 0.2:
            return f"{rng.choice(nouns)}{rng.randint(1, 99)}"
        if rng.random() < 0.2:
            return f"{rng.randint(1, 199)} {rng.choice(names)} {rng.choice(STREETS)}"
        if rng.random() < 0.15:
            return f"{rng.choice(('The', 'A', 'My', 'Our'))} {' '.join(rng.sample(names, 2))}"
        return " ".join(rng.sample(names, rng.choice((1, 1, 2))))
    if kind in ("food", "job", "hobby", "drink", "colour", "animal"):
        return " ".join(rng.sample(nouns, rng.choice((1, 2))))
    if kind == "code":
        letters = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=rng.randint(0, 2)))
        return letters + "".join(rng.choices("0123456789", k=rng.randint(4, 8)))
    return None
