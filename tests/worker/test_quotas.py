"""A tenant's limits in the worker: by what the store remembers, before anything is computed."""

from __future__ import annotations

import time
from pathlib import Path
from unittest import mock

import pytest

from app.messages import Context, EraseTenant, Failed, ForkTenant, RollbackTenant, Update, Updated
from app.store.base import BlobRef, BlockRecord, Manifest
from app.store.disk import DiskStore
from app.store.texts import Texts
from app.worker import quotas
from tests.harness import Harness, load_backbone


@pytest.fixture
def harness() -> Harness:
    return Harness(load_backbone("plain")[0])


def update(harness: Harness, contexts: int, *, key: str | None = None, day: int = 0, most: int = 0) -> object:
    request = harness.id()
    text = [Context(list(range(20 + i, 40 + i))) for i in range(contexts)]
    harness.send(Update(request, "ada", text, key, day, most))
    harness.run()
    return harness.final(request)


def test_contexts_within_a_day_are_counted_across_restarts_of_the_count(harness: Harness) -> None:
    assert isinstance(update(harness, 2, day=3), Updated)
    refused = update(harness, 2, day=3)
    assert isinstance(refused, Failed)
    assert refused.code == "quota_exceeded"
    # one of the two must be a day old
    assert refused.retry_after is not None
    assert quotas.DAY - 60 < refused.retry_after <= quotas.DAY
    assert isinstance(update(harness, 1, day=3), Updated)
    assert isinstance(update(harness, 1, day=3), Failed)
    assert isinstance(update(harness, 1), Updated)
    with mock.patch("time.time", return_value=time.time() + quotas.DAY + 1):
        assert isinstance(update(harness, 3, day=3), Updated)


def test_an_update_larger_than_the_limit_never_fits(harness: Harness) -> None:
    refused = update(harness, 4, day=3)
    assert isinstance(refused, Failed)
    assert refused.retry_after is None
    memory = harness.engine.residency.get("ada")
    assert memory is not None
    assert memory.version == 0


def test_updates_that_compaction_has_archived_count_too() -> None:
    harness = Harness(load_backbone("plain")[0], compacted_after=2)
    assert isinstance(update(harness, 5, day=5), Updated)
    assert isinstance(update(harness, 1, day=5), Failed)


def test_counting_what_the_store_remembers_opens_no_text(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, text_key=b"k" * 32)
    records = [BlockRecord(v, BlobRef("", 0, ""), float(v), 16, "words") for v in range(1, 4)]
    store.create(Manifest("ada", 1, "f", 0.0, version=3), b"pool", records)
    store.commit("ada", 3, b"block", time=quotas.DAY + 2, tokens=16, text="words")
    with mock.patch.object(Texts, "open", side_effect=AssertionError):
        assert quotas.remembered(store, "ada", quotas.DAY + 2) == [3.0, quotas.DAY + 2]
    store.close()


def test_a_retry_of_what_is_done_is_answered_whatever_is_used_up(harness: Harness) -> None:
    first = update(harness, 2, key="k", day=2)
    assert isinstance(first, Updated)
    again = update(harness, 2, key="k", day=2, most=1)
    assert isinstance(again, Updated)
    assert again.replayed
    assert isinstance(update(harness, 1, key="other", day=2), Failed)


def test_bytes_in_the_store(harness: Harness) -> None:
    assert isinstance(update(harness, 1, most=10**9), Updated)
    used = harness.store.usage("ada")
    refused = update(harness, 1, most=used + 100)
    assert isinstance(refused, Failed)
    assert refused.code == "quota_exceeded"
    block = harness.engine.updates._block_bytes
    # each context counts: one would fit
    assert isinstance(update(harness, 2, most=used + 2 * block - 1), Failed)
    assert harness.store.usage("ada") == used
    assert isinstance(update(harness, 2, most=used + 2 * block), Updated)


@pytest.mark.parametrize("undone", ["rolled back", "erased"])
def test_what_was_taken_in_counts_when_it_is_undone(harness: Harness, undone: str) -> None:
    assert isinstance(update(harness, 2, day=3), Updated)
    request = harness.id()
    harness.send(
        RollbackTenant(request, "ada", 0) if undone == "rolled back" else EraseTenant(request, "ada")
    )
    harness.run()
    assert isinstance(update(harness, 2, day=3), Failed)
    assert isinstance(update(harness, 1, day=3), Updated)
    assert isinstance(update(harness, 1, day=3), Failed)


def test_tenants_that_took_nothing_in_for_a_day_are_forgotten() -> None:
    taken = quotas.Taken()
    for number in range(100):
        taken.note(f"tenant {number}", [float(number)])
    taken.note("ada", [quotas.DAY + 49.5])
    assert len(taken._times) == 51  # those of the seconds 50 to 99, and ada
    assert taken.within_a_day("ada", quotas.DAY + 50) == {quotas.DAY + 49.5}
    assert taken.within_a_day("ada", 3 * quotas.DAY) == set()


def test_what_was_rolled_back_counts_after_a_restart_too(harness: Harness) -> None:
    assert isinstance(update(harness, 2, day=4), Updated)
    for version in (1, 0):
        harness.send(RollbackTenant(harness.id(), "ada", version))
        harness.run()
    for contexts, done in ((3, False), (1, True), (2, False), (1, True), (1, False)):
        harness = Harness(harness.engine.backbone, store=harness.store)
        assert isinstance(update(harness, contexts, day=4), Updated if done else Failed)
    with mock.patch("time.time", return_value=time.time() + quotas.DAY + 1):
        assert isinstance(update(harness, 4, day=4), Updated)


def test_what_was_taken_in_before_a_restart_counts_when_it_is_erased(harness: Harness) -> None:
    assert isinstance(update(harness, 2, day=3), Updated)
    for limit, refused in ((3, True), (0, False)):
        again = Harness(harness.engine.backbone, store=harness.store)
        again.send(EraseTenant(again.id(), "ada", limit))
        again.run()
        assert harness.store.load("ada") is None
        assert isinstance(update(again, 2, day=3), Failed if refused else Updated)


def test_a_fork_larger_than_its_limit_is_refused(harness: Harness) -> None:
    assert isinstance(update(harness, 2), Updated)
    used = harness.engine.store.usage("ada")
    for target, most, code in (("bob", used - 1, "quota_exceeded"), ("bob", used, None)):
        request = harness.id()
        harness.send(ForkTenant(request, "ada", target, None, most))
        harness.run()
        found = harness.final(request)
        assert (found.code if isinstance(found, Failed) else None) == code
        assert (harness.engine.store.load("bob") is None) == (code is not None)


def test_one_whose_day_is_over_is_in_nobodys_way() -> None:
    taken, now = quotas.Taken(), 1e9
    taken.note("ada", [now])
    taken.note("bob", [now + 1])
    later = now + quotas.DAY + 10
    # looked at, and refused for something else
    assert taken.within_a_day("ada", later) == set()
    taken.note("bob", [later])
    assert taken.within_a_day("ada", now + 5) == set(), "forgotten by now"
    assert taken.within_a_day("bob", later) == {later}
