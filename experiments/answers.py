"""When an answer counts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

_REFUSALS = re.compile(
    r"\b(i (do not|don't|cannot|can't) (know|say|tell|remember)|i have no idea|"
    r"(not|never) (been )?told|unknown|no answer|not sure)\b"
)


def words(text: str) -> str:
    """Lower case, one space between words, no punctuation at a word's ends: how a reader compares answers."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    stripped = (word.strip("\"'.,;:!?()[]“”‘’«»") for word in folded.split())
    return " ".join(word for word in stripped if word)


def exactly(given: str, accepted: Collection[str]) -> bool:
    """The answer is one of those accepted and nothing else."""
    return given.strip() in accepted


def holds(given: str, accepted: Collection[str]) -> bool:
    """One of the accepted answers stands in it as whole words: the papers' measure for free text."""
    padded = f" {words(given)} "
    return any(f" {words(answer)} " in padded for answer in accepted if words(answer))


def told_by(prompt: str, accepted: Collection[str]) -> bool:
    """The prompt itself holds an answer, so that repeating the prompt would look like remembering."""
    return holds(prompt, accepted)


def refuses(given: str) -> bool:
    """It says that it does not know."""
    return bool(_REFUSALS.search(words(given).replace("’", "'")))
