"""Memories as things: forks that share nothing, rollbacks that keep their place in the queue."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from app.errors import StoreFailed
from app.messages import (
    Erased,
    EraseTenant,
    Failed,
    Finished,
    ForkTenant,
    GetMemory,
    GetTenant,
    MemoryView,
    Reply,
    RollbackTenant,
    TenantInfo,
    Updated,
)
from app.model.backbone import Backbone
from app.store.base import Manifest
from tests.fakes import MemoryStore
from tests.harness import Harness, load_backbone

rng = random.Random(1)


def text(length: int = 20) -> list[int]:
    return [rng.randrange(3, 320) for _ in range(length)]


PROMPT = text(11)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("two-adapters")[0]


@pytest.fixture
def harness(backbone: Backbone) -> Harness:
    return Harness(backbone)


def begin(harness: Harness, make: Any, *fields: Any) -> str:
    request_id = harness.id()
    harness.send(make(request_id, *fields))
    return request_id


def reply(harness: Harness, make: Any, *fields: Any) -> Any:
    request_id = begin(harness, make, *fields)
    harness.run()
    answer = harness.final(request_id)
    return answer.body if isinstance(answer, Reply) else answer


def pool(harness: Harness, tenant: str) -> Any:
    """The pool as the store has it, whatever is resident."""
    manifest = harness.store.load(tenant)
    assert manifest is not None
    return harness.engine.residency.pool(manifest)


def same(harness: Harness, one: str, other: str) -> bool:
    a, b = pool(harness, one), pool(harness, other)
    return torch.equal(a.hidden, b.hidden) and torch.equal(a.born, b.born)


# ---------------------------------------------------------------- fork


@pytest.mark.parametrize("compacted_after", [2, 99])
def test_a_fork_goes_on_as_its_source_would(backbone: Backbone, compacted_after: int) -> None:
    harness = Harness(backbone, compacted_after=compacted_after)
    for _ in range(5):
        harness.update("ada", text())
    info = reply(harness, ForkTenant, "ada", "bob")
    assert isinstance(info, TenantInfo)
    assert (info.tenant, info.memory_version, info.lineage) == ("bob", 5, 0)
    assert same(harness, "ada", "bob")
    assert harness.generate("bob", PROMPT) == harness.generate("ada", PROMPT)
    more = text()
    harness.update("ada", more)
    assert not same(harness, "ada", "bob")
    harness.update("bob", more)
    assert same(harness, "ada", "bob")
    assert isinstance(reply(harness, EraseTenant, "ada"), Erased)
    assert harness.update("bob", text()).memory_version == 7


def test_a_fork_of_an_earlier_version(harness: Harness) -> None:
    contexts = [text() for _ in range(3)]
    for context in contexts[:2]:
        harness.update("ada", context)
    before = harness.generate("ada", PROMPT)
    harness.update("ada", contexts[2])
    assert reply(harness, ForkTenant, "ada", "then", 2).memory_version == 2
    assert harness.generate("then", PROMPT) == before
    harness.update("then", contexts[2])
    assert same(harness, "ada", "then")


def test_forks_that_cannot_be(harness: Harness) -> None:
    harness.update("ada", text())
    harness.update("bob", text())
    bob = harness.store.load("bob")
    for target, version, code in [("bob", None, "tenant_exists"), ("new", 2, "version_not_kept")]:
        failed = reply(harness, ForkTenant, "ada", target, version)
        assert isinstance(failed, Failed)
        assert failed.code == code
    assert reply(harness, ForkTenant, "nobody", "new").code == "tenant_not_found"
    assert harness.store.load("bob") == bob
    assert sorted(harness.store.tenants()) == ["ada", "bob"]


@pytest.mark.parametrize("erased", ["ada", "bob"])
def test_neither_end_of_a_fork_is_erased_while_it_is_made(harness: Harness, erased: str) -> None:
    harness.update("ada", text())
    fork = begin(harness, ForkTenant, "ada", "bob")
    erase = begin(harness, EraseTenant, erased)
    harness.engine.step()
    assert not harness.inline.waiting[1:], "the erasure began under the fork's hands"
    late = begin(harness, ForkTenant, "ada", "bob")
    harness.run()
    assert isinstance(harness.final(fork), Reply)
    assert harness.failure(late).code == "tenant_erased"
    receipt = harness.final(erase)
    assert isinstance(receipt, Reply)
    assert isinstance(receipt.body, Erased)
    assert list(harness.store.tenants()) == [name for name in ("ada", "bob") if name != erased]


# ---------------------------------------------------------------- rollback


@pytest.mark.parametrize("slots", [1, 4])
def test_a_rollback_brings_back_what_was(backbone: Backbone, slots: int) -> None:
    """With one slot the memory of another tenant pushes it out, warm, in between."""
    harness = Harness(backbone, slots=slots, warm_bytes=10**9)
    contexts = [text() for _ in range(4)]
    for context in contexts[:2]:
        harness.update("ada", context)
    then, pool_then = harness.generate("ada", PROMPT), pool(harness, "ada")
    for context in contexts[2:]:
        harness.update("ada", context)
    now = harness.generate("ada", PROMPT)
    if slots == 1:
        harness.generate("bob", PROMPT)
    info = reply(harness, RollbackTenant, "ada", 2)
    assert (info.memory_version, info.lineage) == (2, 1)
    assert torch.equal(pool(harness, "ada").hidden, pool_then.hidden)
    assert harness.generate("ada", PROMPT) == then
    view = reply(harness, GetMemory, "ada")
    assert isinstance(view, MemoryView)
    assert view.memory_version == 2
    assert view.born == pool_then.born.tolist()
    # on the way back up the same updates make the same memory, other updates another one of the same version
    fork = reply(harness, ForkTenant, "ada", "other")
    assert fork.memory_version == 2
    for context in contexts[2:]:
        assert harness.update("ada", context).memory_version in (3, 4)
        harness.update("other", text())
    assert harness.generate("ada", PROMPT) == now
    assert not same(harness, "ada", "other")


def test_a_version_that_comes_again_is_another_content(backbone: Backbone) -> None:
    """A warm copy of version 2 from before the rollback must not pass for version 2 after it."""
    harness = Harness(backbone, slots=1, warm_bytes=10**9)
    for _ in range(2):
        harness.update("ada", text())
    harness.generate("bob", PROMPT)
    assert harness.engine.residency.tier("ada") == "warm"
    # behind the engine's back, as another server on a shared store would do it
    harness.store.rollback("ada", 0, expected_version=2)
    for tenant in ("twin", "ada"):
        manifest = harness.store.load("ada")
        assert manifest is not None
        if tenant == "twin":
            harness.store.fork("ada", "twin", created=0.0)
    updates = [text(), text()]
    other = Harness(backbone, store=harness.store)
    for update in updates:
        other.update("ada", update)
        other.update("twin", update)
    assert harness.generate("ada", PROMPT) == harness.generate("twin", PROMPT)


def test_requests_around_a_rollback_keep_their_order(harness: Harness) -> None:
    """Queued at once: update, generate, rollback, generate, update, generate. Nothing is lost or passes another."""
    first, second = text(), text()
    expected = Harness(harness.engine.backbone)
    empty = expected.generate("ada", PROMPT)
    expected.update("ada", first)
    one = expected.generate("ada", PROMPT)
    expected = Harness(harness.engine.backbone)
    expected.update("ada", second)
    other = expected.generate("ada", PROMPT)
    update = harness.begin_update("ada", first)
    before = harness.begin_generate("ada", PROMPT)
    rollback = begin(harness, RollbackTenant, "ada", 0)
    between = harness.begin_generate("ada", PROMPT)
    again = harness.begin_update("ada", second)
    after = harness.begin_generate("ada", PROMPT)
    harness.run()
    assert isinstance(harness.final(update), Updated)
    assert isinstance(harness.final(rollback), Reply)
    updated = harness.final(again)
    assert isinstance(updated, Updated)
    assert updated.memory_version == 1
    assert [harness.tokens(r) for r in (before, between, after)] == [one, empty, other]
    order = [a for a in harness.answers if isinstance(a, Reply | Updated)]
    assert [a.id for a in order] == [update, rollback, again]


def test_a_running_generation_reads_on_through_a_rollback(backbone: Backbone) -> None:
    harness = Harness(backbone)
    harness.update("ada", text())
    harness.update("ada", text())
    expected = harness.generate("ada", PROMPT, 40)
    running = harness.begin_generate("ada", PROMPT, 40)
    while len(harness.tokens(running)) < 3:
        harness.step()
    rollback = begin(harness, RollbackTenant, "ada", 1)
    while not harness.of(rollback):
        harness.step()
    assert isinstance(harness.final(rollback), Reply)
    assert len(harness.tokens(running)) < 40, "the rollback waited for the reader"
    assert reply(harness, GetMemory, "ada").memory_version == 1
    harness.run()
    assert harness.tokens(running) == expected
    finished = harness.final(running)
    assert isinstance(finished, Finished)
    assert finished.memory_version == 2
    late = harness.begin_generate("ada", PROMPT)
    harness.run()
    finished = harness.final(late)
    assert isinstance(finished, Finished)
    assert finished.memory_version == 1


def test_others_go_on_while_a_tenant_waits_for_its_reader_from_before_a_rollback(backbone: Backbone) -> None:
    harness = Harness(backbone)
    for tenant in ("ada", "bob"):
        harness.update(tenant, text())
    running = harness.begin_generate("ada", PROMPT, 60)
    while not harness.tokens(running):
        harness.step()
    rollback, behind = begin(harness, RollbackTenant, "ada", 0), harness.begin_generate("ada", PROMPT, 2)
    while not harness.of(rollback):
        harness.step()
    other = harness.begin_generate("bob", PROMPT, 2)
    harness.engine.scheduler._counters.charge("bob", 10_000.0)
    while not harness.tokens(other):
        harness.step()
    assert len(harness.tokens(running)) < 60, "bob waited for ada's reader"
    assert not harness.of(behind)
    harness.run()
    finished = harness.final(behind)
    assert isinstance(finished, Finished)
    assert finished.memory_version == 0


def test_rollbacks_that_cannot_be(backbone: Backbone) -> None:
    harness = Harness(backbone, compacted_after=2)
    for _ in range(3):
        harness.update("ada", text())
    before = harness.store.load("ada")
    assert before is not None
    assert before.snapshot is not None
    for version in (0, before.snapshot.version - 1, 4):
        assert reply(harness, RollbackTenant, "ada", version).code == "version_not_kept"
    assert reply(harness, RollbackTenant, "nobody", 0).code == "tenant_not_found"
    assert harness.store.load("ada") == before
    assert harness.store.load("nobody") is None


class LosingStore(MemoryStore):
    """A rollback happens, and then the store cannot say so."""

    def rollback(self, tenant: str, version: int, **expected: Any) -> Manifest:
        super().rollback(tenant, version, **expected)
        raise StoreFailed("the store failed while writing a manifest: nothing is acknowledged")


def test_a_rollback_that_nobody_can_tell_of_is_read_from_the_store(backbone: Backbone) -> None:
    harness = Harness(backbone, store=LosingStore())
    empty = harness.generate("ada", PROMPT)
    harness.update("ada", text())
    assert reply(harness, RollbackTenant, "ada", 0).code == "store_failed"
    assert harness.generate("ada", PROMPT) == empty
    assert harness.update("ada", text()).memory_version == 1


class Meanwhile(MemoryStore):
    """Erases and makes a tenant anew, as another server may, behind the back of one who has just claimed it."""

    due = False

    def claim(self, tenant: str) -> Manifest | None:
        manifest = super().claim(tenant)
        if self.due and manifest is not None:
            self.due = False
            self.erase(tenant)
            other = Harness(load_backbone("two-adapters")[0], store=self)
            for _ in range(manifest.version):
                other.update(tenant, text())
        return manifest


@pytest.mark.parametrize("what", ["update", "rollback"])
def test_what_was_meant_for_an_erased_memory_never_reaches_its_successor(
    backbone: Backbone, what: str
) -> None:
    """Which has come to the same version: a server that stalled past the end of its claim must not write into it."""
    store = Meanwhile()
    harness = Harness(backbone, store=store)
    harness.update("ada", text())
    if what == "rollback":
        store.due = True
        assert reply(harness, RollbackTenant, "ada", 0).code == "version_conflict"
    else:
        update = harness.begin_update("ada", text())
        while not harness.inline.waiting:
            harness.engine.step()
        store.due = True
        store.claim("ada")
        harness.run()
        assert harness.failure(update).code == "version_conflict"
    manifest = store.load("ada")
    assert manifest is not None
    assert (manifest.version, manifest.lineage, len(manifest.blocks)) == (1, 0, 1)
    # and who is told so may try again, on the memory that is there now
    assert harness.update("ada", text()).memory_version == 2


def test_an_erasure_ends_a_rollback_that_waits_or_runs(harness: Harness) -> None:
    harness.update("ada", text())
    update = harness.begin_update("ada", text())
    waiting = begin(harness, RollbackTenant, "ada", 0)
    erase = begin(harness, EraseTenant, "ada")
    harness.run()
    assert harness.failure(update).code == harness.failure(waiting).code == "tenant_erased"
    erased = harness.final(erase)
    assert isinstance(erased, Reply)
    assert isinstance(erased.body, Erased)
    assert erased.body.cancelled == 2
    harness.update("ada", text())
    running = begin(harness, RollbackTenant, "ada", 0)
    harness.engine.step()
    erase = begin(harness, EraseTenant, "ada")
    harness.run()
    assert harness.failure(running).code == "tenant_erased"
    assert isinstance(harness.final(erase), Reply)
    assert reply(harness, GetTenant, "ada").code == "tenant_not_found"


def test_another_tenant_goes_on_beside_a_rollback(harness: Harness) -> None:
    expected = harness.generate("bob", PROMPT, 30)
    harness.update("ada", text())
    running = harness.begin_generate("bob", PROMPT, 30)
    while len(harness.tokens(running)) < 3:
        harness.step()
    rollback = begin(harness, RollbackTenant, "ada", 0)
    harness.engine.step()
    for _ in range(5):
        # its thread has not come back
        harness.engine.step()
    harness._collect()
    assert len(harness.tokens(running)) >= 8
    assert not harness.of(rollback)
    harness.run()
    assert harness.tokens(running) == expected
