"""What a server has acknowledged, update by update, and whether a history says the same.

Updates are told apart by their key, or, without one, by how many tokens they have: no two that may be unanswered at
once have equally many. Each is made from its tenant and number alone, so that it can be computed again.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_LENGTHS = 97
_LONG_EVERY = 12
# more than one context takes: two blocks
_LONG = 513


class Violation(AssertionError):
    """Something acknowledged is lost, doubled, out of order or another tenant's."""


class Part(NamedTuple):
    """One block: context ``index`` of update ``number``."""

    number: int
    index: int


def key_of(tenant: str, number: int) -> str | None:
    """Every other update carries one."""
    return f"{tenant}:{number}" if number % 2 == 0 else None


def tokens_of(tenant: str, number: int) -> list[int]:
    length = (_LONG if number % _LONG_EVERY == 0 else 16) + number % _LENGTHS
    return random.Random(f"{tenant}/{number}").choices(range(3, 320), k=length)


def contexts_of(tenant: str, number: int) -> list[list[int]]:
    """As the server cuts it."""
    tokens = tokens_of(tenant, number)
    half = len(tokens) // 2
    return [tokens[:half], tokens[half:]] if len(tokens) >= _LONG else [tokens]


@dataclass
class Ledger:
    """One tenant. ``parts[v - 1]`` is what version v was found to be; ``open`` are updates without an answer."""

    tenant: str
    parts: list[Part] = field(default_factory=list)
    open: set[int] = field(default_factory=set)
    acknowledged: dict[int, int] = field(default_factory=dict)
    numbers: int = 0
    highest: int = 0
    guard: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> int:
        with self.guard:
            self.numbers += 1
            self.open.add(self.numbers)
            return self.numbers

    def refused(self, number: int) -> None:
        """The server has said that it did nothing."""
        with self.guard:
            self.open.discard(number)

    def answered(self, number: int, version: int) -> None:
        """The update is acknowledged, its last block as ``version``."""
        with self.guard:
            self.open.discard(number)
            self.acknowledged[number] = version
            self.highest = max(self.highest, version)

    def settle(self, entries: list[dict[str, Any]], version: int) -> None:
        """Compares with the history's ``entries`` after ``parts``, oldest first; then they are ``parts`` too.

        Raises Violation.
        """
        with self.guard:
            self._take(entries, version)
            self._check()

    def _take(self, entries: list[dict[str, Any]], version: int) -> None:
        found = [entry["memory_version"] for entry in entries]
        if found != list(range(len(self.parts) + 1, version + 1)):
            raise Violation(f"{self.tenant}: versions {found} after {len(self.parts)}, {version} in all")
        there = {part.number for part in self.parts}
        for entry in entries:
            number = self._number(entry, there)
            index = sum(part.number == number for part in self.parts[-200:])
            contexts = contexts_of(self.tenant, number)
            if index >= len(contexts) or len(contexts[index]) != entry["tokens"]:
                raise Violation(f"{self.tenant}: update {number} is doubled or another's: {entry}")
            self.parts.append(Part(number, index))
            there.add(number)

    def _number(self, entry: dict[str, Any], there: set[int]) -> int:
        key = entry["idempotency_key"]
        if key is not None:
            tenant, _, number = key.rpartition(":")
            if tenant != self.tenant or int(number) > self.numbers:
                raise Violation(f"{self.tenant} holds another tenant's update: {key}")
            return int(number)
        for number in sorted({*self.open, *self.acknowledged} - there):
            if key_of(self.tenant, number) is None:
                (context,) = contexts_of(self.tenant, number)
                if len(context) == entry["tokens"]:
                    return number
        raise Violation(f"{self.tenant}: nobody sent this, or it was there already: {entry}")

    def _check(self) -> None:
        for number, version in self.acknowledged.items():
            count = len(contexts_of(self.tenant, number))
            last = self.parts[version - 1] if version <= len(self.parts) else None
            if last != Part(number, count - 1):
                raise Violation(
                    f"{self.tenant}: update {number} is acknowledged as {version}; there is {last}"
                )
        # one without a key that is not there by now was never written; asked again it would be another update
        self.open = {number for number in self.open if key_of(self.tenant, number) is not None}
        # what is checked once is checked by its place in ``parts`` from here on
        self.acknowledged.clear()
