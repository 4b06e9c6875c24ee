"""Who people know, and what their animals are called."""

from training.relations.relation import kin, named

KIN = (
    "wife", "husband", "sister", "brother", "best friend", "boss", "doctor", "teacher", "neighbour", "son", "daughter",
    "mother", "father", "aunt", "uncle", "cousin", "grandmother", "grandfather", "lawyer", "landlord", "coach",
    "colleague", "roommate", "hairdresser",
)  # fmt: skip
NAMED = ("dog", "cat", "horse", "parrot", "boat", "rabbit", "hamster", "tortoise", "pony")

PEOPLE = (*(named(noun) for noun in NAMED), *(kin(noun) for noun in KIN))
