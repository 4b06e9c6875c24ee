"""Word lists and spellers for the fact generator: names, places, codes, times.

Open values are spelled from syllables, so that the model must copy what it was told; whether a spelled word may
appear in training is decided by a hash of the word itself (`is_held_out`), which needs no list to be kept.
"""

# Word lists are easier to read and edit as running text.
# ruff: noqa: SIM905

from __future__ import annotations

import random
import zlib

FIRST_NAMES = """Anna Ben Carla David Emma Frank Grace Henry Iris Jack Karen Leo Maria Nina Oscar Paul Quinn Rosa Sam
Tina Uma Victor Wendy Xavier Yusuf Zoe Adam Alice Amir Andre Angela Anton Arthur Bella Boris Bruno Carlos Cecilia
Chen Clara Daniel Diana Dmitri Edith Elena Eli Elsa Emil Erik Eva Farid Felix Fiona Fred George Gina Greta Hana
Hannah Hans Hugo Igor Ines Ivan Jana Jane Jean Jenny Joan John Jonas Jorge Julia Kai Kate Kim Klaus Lara Laura Lena
Liam Lily Lin Louis Lucas Lucy Luis Luke Lydia Marco Marie Mark Marta Martin Mary Max Maya Mei Mia Mike Mila Mira
Mohamed Mona Nadia Nathan Nick Noah Nora Olga Oliver Olivia Omar Otto Pablo Peter Petra Priya Rachel Ravi Rita
Robert Robin Ruth Sara Sofia Simon Stella Steve Susan Tara Theo Thomas Tim Tom Vera Walter Yara Yuki Zara""".split()

LAST_NAMES = """Adams Allen Andersen Bailey Baker Barnes Bauer Becker Bell Bennett Berg Brooks Brown Burke Campbell
Carter Castro Chang Clark Cole Cook Cooper Costa Cruz Davis Diaz Duncan Ellis Evans Ferrari Fischer Fisher Ford
Foster Fox Garcia Gibson Gomez Grant Gray Green Hall Hansen Harris Hayes Hill Hoffman Howard Hughes Hunt Ivanov
Jackson Jansen Jensen Johnson Jones Kelly Khan King Klein Kovacs Kumar Lang Larsen Lee Lewis Long Lopez Marino Martinez
Mason Meyer Miller Mills Moore Moreno Morgan Morris Murphy Nelson Nguyen Novak Olsen Ortiz Owens Palmer Park Parker
Patel Perez Perry Petrov Price Ramos Reed Reyes Rice Rivera Roberts Rossi Russo Sanders Sato Schmidt Scott Shaw Silva
Singh Smith Stone Suzuki Tanaka Taylor Torres Turner Walker Wang Ward Watson Weber White Wilson Wong Wood Wright
Young Zhang""".split()

COLOURS = """red blue green black white pink brown grey orange purple gold silver yellow turquoise violet beige crimson
maroon olive teal lilac ivory navy amber bronze magenta indigo coral scarlet cream""".split()

FOODS = """pizza rice soup bread cheese fish eggs pasta cake beans nuts milk honey apples shrimp corn butter garlic
onions tomatoes carrots peaches mushrooms strawberries cherries spinach lentils dumplings pancakes noodles curry
chocolate oysters olives bananas potatoes salmon tofu yoghurt waffles""".split()

DRINKS = """coffee,tea,water,juice,cider,lemonade,cocoa,wine,beer,mead,tonic,soda,espresso,kombucha,ginger ale,
peppermint tea,oat milk,tomato juice,green tea,black coffee""".replace("\n", "").split(",")

JOBS = """doctor teacher farmer pilot baker lawyer nurse painter singer driver judge cook clerk guard miner plumber
carpenter dentist writer tailor barber butcher chemist surgeon gardener librarian translator photographer sailor
waiter potter banker florist jeweller optician beekeeper geologist locksmith welder referee""".split()

HOBBIES = """chess fishing running reading dancing hiking cooking sailing skating knitting gardening climbing swimming
painting singing cycling surfing archery pottery origami karate yoga boxing judo rowing juggling fencing tennis
football golf""".split()

INSTRUMENTS = """piano guitar violin drums flute harp cello trumpet banjo clarinet oboe tuba ukulele saxophone
accordion organ viola trombone mandolin bassoon""".split()

LANGUAGES = """French German Spanish Italian Polish Russian Greek Turkish Arabic Hindi Chinese Japanese Korean Dutch
Swedish Danish Finnish Czech Hungarian Hebrew Latin Swahili Welsh Irish Basque Thai""".split()

ANIMALS = """horses owls wolves foxes snakes spiders whales tigers bears rabbits goats parrots turtles frogs otters
eagles dolphins hedgehogs penguins camels""".split()

FLOWERS = """roses tulips lilies daisies violets orchids poppies sunflowers irises pansies marigolds peonies dahlias
asters carnations""".split()

COUNTRIES = """Norway Sweden Finland Denmark Iceland Ireland France Spain Portugal Italy Greece Poland Austria Hungary
Romania Croatia Turkey Egypt Morocco Kenya Ghana Nigeria Ethiopia Canada Mexico Cuba Brazil Peru Chile Argentina Japan
China Korea Vietnam Thailand India Nepal Pakistan Australia""".split()

SEASONS = "spring summer autumn winter".split()
MONTHS = "January February March April May June July August September October November December".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COMPANY_ENDINGS = "Systems Motors Bank Labs Foods Group Works Airlines Press Tools".split()
TITLES = "Dr. Mr. Mrs. Ms. Professor".split()

STARTS = """ba be bo bra da de do dra fa fe fi fo ga go gra ha he ho ja jo ka ke ko kra la le li lo lu ma me mi mo mu
na ne no nu o pa pe po pri ra re ri ro sa se si so sta ta te ti to tra u va ve vi vo wa we za ze zo bel cor dal dor
fen gar hal kal kor lan mar mel mor nar nor pel ran ros sel sol tar tor val var vel vol wel zan zel""".split()
MIDDLES = """ba be bi da de di do du fa ga go ka ke ki la le li lo lu ma me mi mo na ne ni no ra re ri ro sa se si so
ta te ti to va ve vi vo za""".split()
ENDS = """dan den dor fa fen ga gan go ka kas ko la lan len lia lin lo lon ma mar men mir mon na nas nek nia nik no nor
ra ran ria rin ro ron sa sen ska son ta tan ten ter tis to ton va van vik vin vo wen za zen zo""".split()
ACCENTS = {
    "a": "áäåã",
    "e": "éèë",
    "i": "íï",
    "o": "öóøô",
    "u": "üú",
    "n": "ñń",
    "s": "šś",
    "c": "çč",
    "z": "žż",
}

HELD_OUT_SHARE = 8


def is_held_out(word: str) -> bool:
    """True for the eighth of all spelled words and full names that training must never see."""
    return zlib.crc32(word.encode()) % HELD_OUT_SHARE == 0


def spell(rng: random.Random) -> str:
    """One made-up capitalised word of 2 or 3 syllables, now and then with accents."""
    syllables = [rng.choice(STARTS)]
    if rng.random() < 0.3:
        syllables.append(rng.choice(MIDDLES))
    syllables.append(rng.choice(ENDS))
    word = "".join(syllables)
    if rng.random() < 0.06:
        at = rng.randrange(len(word))
        word = word[:at] + rng.choice(ACCENTS.get(word[at], word[at])) + word[at + 1 :]
    return word[0].upper() + word[1:]


def spelled(rng: random.Random, held_out: bool) -> str:
    """A made-up word from the asked side of the held-out split."""
    while True:
        word = spell(rng)
        if is_held_out(word) == held_out:
            return word


def person(rng: random.Random, held_out: bool) -> str:
    """A person's name: real or made up, one word or two.

    Real first names alone are too few to be split, so held-out people always have a spelled word or a pair of
    real names that training never pairs.
    """
    while True:
        draw = rng.random()
        if draw < 0.3:
            if held_out:
                continue
            return rng.choice(FIRST_NAMES)
        if draw < 0.6:
            name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
            if is_held_out(name) == held_out:
                return name
            continue
        if draw < 0.8:
            return spelled(rng, held_out)
        if draw < 0.9:
            return f"{rng.choice(FIRST_NAMES)} {spelled(rng, held_out)}"
        return f"{spelled(rng, held_out)} {spelled(rng, held_out)}"


def digits(rng: random.Random, count: int) -> str:
    """`count` digits, the first one not zero."""
    return str(rng.randint(10 ** (count - 1), 10**count - 1))


def code(rng: random.Random) -> str:
    """A code of capital letters and digits, such as K7-492."""
    letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
    shape = rng.random()
    if shape < 0.4:
        return f"{rng.choice(letters)}{rng.randint(1, 9)}-{digits(rng, 3)}"
    if shape < 0.7:
        return rng.choice(letters) + rng.choice(letters) + digits(rng, 3)
    return digits(rng, rng.choice((4, 5, 6)))


def value(rng: random.Random, kind: str, held_out: bool) -> str:
    """A value of one kind. Kinds with few members (colour, food, job, …) have no held-out side."""
    closed = {
        "colour": COLOURS, "food": FOODS, "drink": DRINKS, "job": JOBS, "hobby": HOBBIES,
        "instrument": INSTRUMENTS, "language": LANGUAGES, "animal": ANIMALS, "weekday": WEEKDAYS,
        "flower": FLOWERS, "country": COUNTRIES, "season": SEASONS, "month": MONTHS,
    }  # fmt: skip
    if kind in closed:
        return rng.choice(closed[kind])
    if kind == "word":
        return spelled(rng, held_out)
    if kind == "person":
        return (
            f"{rng.choice(TITLES)} {person(rng, held_out)}" if rng.random() < 0.1 else person(rng, held_out)
        )
    if kind == "company":
        word = spelled(rng, held_out)
        return f"{word} {rng.choice(COMPANY_ENDINGS)}" if rng.random() < 0.4 else word
    if kind == "time":
        return f"{rng.randint(6, 22)}:{rng.randrange(0, 60, 5):02d}"
    if kind == "clock":
        minutes = f":{rng.randrange(0, 60, 5):02d}" if rng.random() < 0.5 else ""
        return f"{rng.randint(1, 12)}{minutes} {rng.choice(('am', 'pm'))}"
    if kind == "seat":
        return f"{rng.randint(1, 48)}{rng.choice('ABCDEF')}"
    if kind == "long date":
        day, month, year = rng.randint(1, 28), rng.choice(MONTHS), rng.randint(1960, 2029)
        return f"{month} {day}, {year}" if rng.random() < 0.5 else f"{day} {month} {year}"
    if kind == "date":
        day, month = rng.randint(1, 28), rng.choice(MONTHS)
        return f"{month} {day}" if rng.random() < 0.5 else f"{day} {month}"
    if kind == "age":
        return str(rng.randint(11, 98))
    if kind == "number":
        return digits(rng, rng.choice((2, 3, 3)))
    if kind == "year":
        return str(rng.randint(1900, 2029))
    if kind == "phone":
        return f"{digits(rng, 3)}-{digits(rng, 4)}"
    if kind == "code":
        return code(rng)
    raise ValueError(f"unknown kind of value: {kind}")
