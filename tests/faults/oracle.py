"""What a worker must say: an undisturbed one says it, told the same contexts in the same order."""

from __future__ import annotations

import random

import torch

from app.memory.codec import Block, Pool, decode_block
from app.memory.source import default_seed
from app.messages import CreateTenant
from app.model.backbone import Backbone
from tests.fakes import MemoryStore
from tests.harness import Harness

PROMPT = [5, 6, 7, 8, 9, 10, 11]
CONTINUATION = [40, 41, 42, 43]
MOST_TOKENS = 10
Told = tuple[str, ...]


def tokens_of(text: str) -> list[int]:
    """The tokens that the bench gives a context of this text."""
    draw = random.Random(text)
    return [draw.randrange(3, 320) for _ in range(20)]


class Oracle:
    """Knows a memory by its tenant, whose name gives the seed, and the texts it was told."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._store = MemoryStore()
        self._worker = Harness(backbone, store=self._store, slots=6, compacted_after=10**6)
        self._names: dict[tuple[str, Told], str] = {}
        self._scores: dict[str, list[float]] = {}
        self._texts: dict[str, list[int]] = {}

    def _name(self, tenant: str, told: Told) -> str:
        """The oracle's own tenant that holds this memory."""
        found = self._names.get((tenant, told))
        if found is not None:
            return found
        name = f"t{len(self._names)}"
        if told:
            before = self._name(tenant, told[:-1])
            name = f"t{len(self._names)}"
            self._store.fork(before, name, created=0.0)
            self._worker.update(name, tokens_of(told[-1]))
        else:
            self._worker.send(CreateTenant(self._worker.id(), name, default_seed(tenant)))
            self._worker.run()
        self._names[tenant, told] = name
        return name

    def scores(self, tenant: str, told: Told) -> list[float]:
        name = self._name(tenant, told)
        if name not in self._scores:
            self._scores[name] = self._worker.score(name, PROMPT, CONTINUATION).logprobs
        return self._scores[name]

    def tokens(self, tenant: str, told: Told) -> list[int]:
        name = self._name(tenant, told)
        if name not in self._texts:
            self._texts[name] = self._worker.generate(name, PROMPT, MOST_TOKENS)
        return self._texts[name]

    def block(self, tenant: str, told: Told) -> Block:
        """The block that the last of ``told`` became."""
        manifest = self._store.load(self._name(tenant, told))
        assert manifest is not None
        return decode_block(self._store.read(manifest.tenant, manifest.blocks[-1].blob))

    def pool(self, tenant: str, told: Told) -> Pool:
        manifest = self._store.load(self._name(tenant, told))
        assert manifest is not None
        return self._worker.engine.residency.pool(manifest)


def same_block(one: Block, other: Block) -> bool:
    if (one.forgotten is None) != (other.forgotten is None):
        return False
    ranks = one.forgotten is None or torch.equal(one.forgotten, other.forgotten)  # type: ignore[arg-type]
    return ranks and torch.allclose(one.hidden, other.hidden, atol=1e-4)


def same_pool(one: Pool, other: Pool) -> bool:
    return torch.equal(one.born, other.born) and torch.allclose(one.hidden, other.hidden, atol=1e-4)
