"""The relations facts are about, and how they are said and asked."""

from training.relations.days import DAYS
from training.relations.life import LIFE
from training.relations.numbers import NUMBERS
from training.relations.people import PEOPLE
from training.relations.relation import Relation, word_it
from training.relations.tastes import TASTES
from training.relations.world import WORLD

__all__ = ["NEAR", "OPEN_KINDS", "RELATIONS", "Relation", "word_it"]

RELATIONS: tuple[Relation, ...] = (*PEOPLE, *TASTES, *LIFE, *NUMBERS, *DAYS, *WORLD)

OPEN_KINDS = frozenset(
    {
        "word",
        "person",
        "company",
        "time",
        "clock",
        "date",
        "long date",
        "number",
        "year",
        "phone",
        "code",
        "seat",
    }
)

# Told one of a set, one half knows the others: none of them is a question without an answer then.
_NEAR = (
    {"home", "birthplace", "street", "holiday", "country", "office"},
    {"job", "employer", "office", "boss", "first day"},
    {"birthday", "age", "birth year"}, {"flight", "flight time", "seat", "ticket number"}, {"room", "hotel"},
    {"password", "username", "PIN", "door code"}, {"car", "number plate"}, {"bank", "account number"},
    {"instrument", "favourite game", "hobby"}, {"favourite food", "favourite drink", "favourite restaurant", "allergy"},
    {"appointment", "meeting", "lesson"}, {"school", "graduation", "lesson"}, {"leader", "mayor", "capital"},
    {"book", "favourite author", "newspaper"}, {"nickname", "middle name", "username"}, {"wifi", "alarm code"},
    {"language", "country"}, {"home", "moving month"}, {"favourite colour", "favourite flower"},
    {"favourite song", "instrument"}, {"coach", "gym"}, {"landlord", "rent"}, {"doctor", "appointment"},
)  # fmt: skip
NEAR: dict[str, frozenset[str]] = {
    relation.name: frozenset().union({relation.name}, *(near for near in _NEAR if relation.name in near))
    for relation in RELATIONS
}
