"""Two workers on one Redis: one at a time serves a tenant, and nobody answers from a memory that is out of date."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from app.messages import (
    Cancel,
    Failed,
    Generate,
    GetMemory,
    GetTenant,
    MemoryView,
    Reply,
    Sampling,
    TenantInfo,
)
from app.store.base import Store
from app.store.url import open_store
from tests.harness import Harness, load_backbone
from tests.store.redisserver import RedisServer

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    redis_server = RedisServer(tmp_path_factory.mktemp("shared"))
    yield redis_server
    redis_server.stop()


@pytest.fixture
def workers(server: RedisServer) -> Iterator[tuple[Harness, Harness]]:
    with server.client() as client:
        client.flushall()
    stores = [open_store(f"{server.url}?lease=1") for _ in range(2)]
    backbone, fingerprint = load_backbone("plain")
    first, second = (
        Harness(backbone, fingerprint, store=store, slots=2, warm_bytes=10**8) for store in stores
    )
    yield first, second
    for store in stores:
        store.close()


def context(first: int) -> list[int]:
    return list(range(first, first + 20))


def patiently(worker: Harness, tenant: str, store: Store) -> list[int]:
    """Generates as a client does who is told to come back later."""
    end = time.monotonic() + 20
    while True:
        request = worker.id()
        worker.send(Generate(request, tenant, PROMPT, Sampling(max_tokens=4)))
        worker.run()
        final = worker.final(request)
        if not isinstance(final, Failed):
            return worker.tokens(request)
        assert final.code in ("tenant_elsewhere", "version_conflict")
        assert final.retry_after is not None
        assert time.monotonic() < end, "the other worker never gave way"
        time.sleep(0.05)


def test_a_worker_that_comes_back_reads_what_the_other_wrote(workers: tuple[Harness, Harness]) -> None:
    first, second = workers
    first.update("ada", context(20))
    before = first.generate("ada", PROMPT, 4)
    assert patiently(second, "ada", second.store) == before
    second.update("ada", context(60))
    after = second.generate("ada", PROMPT, 4)
    # the first still has version 1 resident, and must not answer from it
    memory = first.engine.residency.get("ada")
    assert memory is not None
    assert memory.version == 1
    assert patiently(first, "ada", first.store) == after
    memory = first.engine.residency.get("ada")
    assert memory is not None
    assert memory.version == 2


def test_what_else_takes_the_claim_makes_no_old_memory_new(workers: tuple[Harness, Harness]) -> None:
    """As the look for an idempotency key does, or a rollback."""
    first, second = workers
    first.update("ada", context(20))
    assert patiently(second, "ada", second.store)
    second.update("ada", context(60))
    after = second.generate("ada", PROMPT, 4)
    second.store.close()
    first.store.claim("ada")
    assert first.store.claimed("ada")
    memory = first.engine.residency.get("ada")
    assert memory is not None
    assert memory.version == 1
    first.send(GetMemory("memory", "ada"))
    first.run()
    view = first.final("memory")
    assert isinstance(view, Reply)
    assert isinstance(view.body, MemoryView)
    assert view.body.memory_version == 2
    assert first.generate("ada", PROMPT, 4) == after


def test_while_one_works_the_other_says_come_back(workers: tuple[Harness, Harness]) -> None:
    first, second = workers
    first.update("ada", context(20))
    first.send(Generate("long", "ada", PROMPT, Sampling(max_tokens=50)))
    first.step()
    first.step()
    request = second.id()
    second.send(Generate(request, "ada", PROMPT, Sampling(max_tokens=4)))
    second.run()
    final = second.final(request)
    assert isinstance(final, Failed)
    assert final.code == "tenant_elsewhere"
    # looking does not disturb, and other tenants are served
    second.send(GetTenant("look", "ada"))
    second.run()
    look = second.final("look")
    assert isinstance(look, Reply)
    assert isinstance(look.body, TenantInfo)
    assert look.body.memory_version == 1
    assert second.generate("bob", PROMPT, 4)
    first.run()
    assert len(first.tokens("long")) == 50


@pytest.mark.parametrize("tier", ["resident", "warm"])
def test_a_tenant_made_anew_elsewhere_is_another(workers: tuple[Harness, Harness], tier: str) -> None:
    first, second = workers
    first.update("ada", context(20))
    assert patiently(second, "ada", second.store)
    assert second.store.erase("ada") is not None
    second.engine.residency.forget("ada")
    second.update("ada", context(60))
    anew = second.generate("ada", PROMPT, 4)
    if tier == "warm":
        for other in ("bob", "cyd"):
            first.generate(other, PROMPT, 4)
    assert first.engine.residency.tier("ada") == tier
    # as old, by lineage and version, as the one that the first knows
    assert patiently(first, "ada", first.store) == anew


def test_a_claim_for_a_request_that_went_away_is_given_up(workers: tuple[Harness, Harness]) -> None:
    first, second = workers
    first.update("ada", context(20))
    first.engine.residency.forget("ada")
    request = first.id()
    first.send(Generate(request, "ada", PROMPT, Sampling(max_tokens=4)))
    assert first.engine.residency.prepare("ada", read=True)
    first.send(Cancel(request))
    first.run()
    assert first.engine.residency.get("ada") is not None
    assert patiently(second, "ada", second.store)


def test_a_tenant_erased_elsewhere_begins_anew(workers: tuple[Harness, Harness]) -> None:
    first, second = workers
    empty = first.generate("ada", PROMPT, 4)
    first.update("ada", context(20))
    assert patiently(second, "ada", second.store)
    assert second.store.erase("ada") is not None
    second.engine.residency.forget("ada")
    assert patiently(first, "ada", first.store) == empty
    memory = first.engine.residency.get("ada")
    assert memory is not None
    assert memory.version == 0
