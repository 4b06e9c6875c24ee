"""The engine's promises: order, versions, durability before acknowledgement, failures that stay where they are."""

from __future__ import annotations

import random
import time
from typing import Any
from unittest import mock

import pytest
import torch

from app.errors import StoreFailed, StoreFull, TenantQuarantined, VersionConflict
from app.memory.codec import encode_snapshot
from app.messages import (
    Cancel,
    CreateTenant,
    Drain,
    Erased,
    EraseTenant,
    Failed,
    Finished,
    Generate,
    GetHistory,
    GetMemory,
    GetTenant,
    History,
    ListTenants,
    MemoryView,
    Reply,
    Sampling,
    TenantInfo,
    TenantList,
    Tokens,
    Updated,
    UpdateProgress,
)
from app.model.backbone import Backbone
from app.store.base import BlobRef, BlockRecord, Manifest
from app.worker.scheduler import Limits
from tests.fakes import MemoryStore
from tests.harness import Harness, load_backbone

rng = random.Random(0)


def text(length: int = 20) -> list[int]:
    return [rng.randrange(3, 320) for _ in range(length)]


PROMPT = text(11)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("two-adapters")[0]


@pytest.fixture
def harness(backbone: Backbone) -> Harness:
    return Harness(backbone)


def reply(harness: Harness, make: Any, **fields: Any) -> Any:
    request_id = harness.id()
    harness.send(make(request_id, **fields))
    harness.run()
    answer = harness.final(request_id)
    assert isinstance(answer, Reply | Failed), answer
    return answer.body if isinstance(answer, Reply) else answer


class FaultyStore(MemoryStore):
    """Raises ``fault`` at the next commit; ``lost`` says the commit happens all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: Exception | None = None
        self.lost = False
        self.damaged: set[str] = set()

    def commit(self, tenant: str, expected_version: int, blob: bytes, **rest: Any) -> Manifest:
        fault, self.fault = self.fault, None
        if fault is not None and not self.lost:
            raise fault
        manifest = super().commit(tenant, expected_version, blob, **rest)
        if fault is not None:
            raise fault
        return manifest

    def read(self, tenant: str, blob: BlobRef) -> bytes:
        if tenant in self.damaged:
            raise TenantQuarantined("a blob of this tenant is damaged")
        return super().read(tenant, blob)


def test_an_update_is_committed_before_it_is_acknowledged(harness: Harness) -> None:
    request_id = harness.begin_update("ada", text())
    commits = 0
    original = harness.store.commit

    def commit(*arguments: Any, **rest: Any) -> Manifest:
        nonlocal commits
        assert not harness.of(request_id), "acknowledged before it was durable"
        memory = harness.engine.residency.get("ada")
        assert memory is not None
        assert memory.version == 0, "published before it was durable"
        commits += 1
        return original(*arguments, **rest)

    harness.store.commit = commit  # type: ignore[method-assign]
    harness.run()
    assert isinstance(harness.final(request_id), Updated)
    assert commits == 1


def test_the_engine_asks_for_another_step_while_it_has_work(harness: Harness) -> None:
    """The loop sleeps when ``step`` says False: then only a background result may be what is waited for."""
    request_id = harness.begin_update("ada", text(), text())
    for _ in range(200):
        moved = harness.step()
        if harness.engine.idle:
            break
        assert moved or harness.inline.waiting, "the loop would sleep with work at hand"
    assert isinstance(harness.final(request_id), Updated)


def test_a_running_generation_reads_the_version_it_began_with(backbone: Backbone) -> None:
    alone = Harness(backbone)
    expected = alone.generate("ada", PROMPT, 40)
    harness = Harness(backbone)
    first = harness.begin_generate("ada", PROMPT, 40)
    while len(harness.tokens(first)) < 3:
        harness.step()
    update = harness.begin_update("ada", text(), text())
    second = harness.begin_generate("ada", PROMPT, 40)
    while len(harness.tokens(first)) < 30:
        harness.step()
    progress = [a for a in harness.of(update) if isinstance(a, UpdateProgress)]
    # one block fits into the spare slots while the old version is read; the second must wait for its reader
    assert [p.memory_version for p in progress] == [1]
    assert harness.tokens(second) == []
    harness.run()
    assert harness.tokens(first) == expected
    done, after = harness.final(update), harness.final(second)
    assert isinstance(done, Updated)
    assert (done.memory_version, done.blocks) == (2, 2)
    assert isinstance(after, Finished)
    assert after.memory_version == 2


def test_more_tenants_than_slots_are_evicted_and_read_back(backbone: Backbone) -> None:
    names = [f"t{i}" for i in range(7)]
    contexts = {name: [text() for _ in range(3)] for name in names}
    wide = Harness(backbone, slots=8)
    for warm in (0, 10**9):
        narrow = Harness(backbone, slots=2, hot=2, warm_bytes=warm)
        for turn in range(3):
            for name in names:
                narrow.update(name, contexts[name][turn])
                if not warm:
                    wide.update(name, contexts[name][turn])
        ids = {name: narrow.begin_generate(name, PROMPT) for name in names}
        narrow.run()
        for name in names:
            assert narrow.tokens(ids[name]) == wide.generate(name, PROMPT)
        assert narrow.engine.residency.counts["resident"] == 2
        assert bool(narrow.engine.residency.traffic.loads["warm"]) == bool(warm)


def test_a_restart_brings_back_every_version_bit_for_bit(backbone: Backbone) -> None:
    store = MemoryStore()
    harness = Harness(backbone, store=store, compacted_after=4)
    for _ in range(11):
        harness.update("ada", text())
    memory = harness.engine.residency.get("ada")
    assert memory is not None
    manifest = store.load("ada")
    assert manifest is not None
    assert manifest.snapshot is not None, "eleven updates must have been compacted"
    again = Harness(backbone, store=store)
    probe = text(8)
    scores = [h.score("ada", PROMPT, probe).logprobs for h in (harness, again)]
    # tokens may lie in other slots, so sums run in another order
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    reloaded = again.engine.residency.get("ada")
    assert reloaded is not None
    assert reloaded.version == memory.version == 11
    assert torch.equal(reloaded.born, memory.born)
    assert memory.tail is not None
    assert reloaded.tail is not None
    assert torch.equal(reloaded.tail, memory.tail)
    # the projected pools agree bit for bit as well, wherever their tokens lie
    for layer in range(backbone.config.num_layers):
        pools = []
        for h, m in ((harness, memory), (again, reloaded)):
            order = m.view.rank[layer].argsort()[backbone.config.num_tokens :]
            pools.append(h.engine.arena.pools.key[layer, m.slot][:, order])
        assert torch.equal(*pools)


def test_an_idempotency_key_gets_the_first_answer(harness: Harness) -> None:
    contexts = [text(), text()]
    first = harness.update("ada", *contexts, key="k")
    again = harness.update("ada", *contexts, key="k")
    assert (again.memory_version, again.blocks, again.tokens) == (2, 2, 40)
    assert again.surviving_share == first.surviving_share
    assert (first.replayed, again.replayed) == (False, True)
    assert harness.update("ada", text(), key="other").memory_version == 3
    late = harness.update("ada", *contexts, key="k")
    assert late.memory_version == 2
    conflict = harness.begin_update("ada", text(), key="k")
    harness.run()
    assert harness.failure(conflict).code == "idempotency_conflict"
    assert harness.store.load("ada").version == 3  # type: ignore[union-attr]


def test_an_update_is_told_the_mean_share_of_its_blocks_that_is_left(harness: Harness) -> None:
    contexts = [text(), text(), text()]
    # six blocks: each update takes a sixth of what is there
    expected = (25 / 36 + 5 / 6 + 1) / 3
    for _ in range(2):
        assert harness.update("ada", *contexts, key="k").surviving_share == pytest.approx(expected)
    assert harness.update("ada", text()).surviving_share == 1.0


def test_two_retries_at_once_write_once(harness: Harness) -> None:
    contexts = [text(), text(), text()]
    ids = [harness.begin_update("ada", *contexts, key="k") for _ in range(3)]
    harness.run()
    answers = [harness.final(i) for i in ids]
    assert [a.memory_version for a in answers if isinstance(a, Updated)] == [3, 3, 3]
    assert harness.store.load("ada").version == 3  # type: ignore[union-attr]


def test_a_retry_goes_on_behind_what_a_crash_left(backbone: Backbone) -> None:
    contexts = [text() for _ in range(4)]
    whole = Harness(backbone)
    whole.update("ada", *contexts)
    store = MemoryStore()
    crashed = Harness(backbone, store=store)
    crashed.begin_update("ada", *contexts, key="k")
    while store.load("ada") is None or store.load("ada").version < 2:  # type: ignore[union-attr]
        crashed.step()
    again = Harness(backbone, store=store)
    answer = again.update("ada", *contexts, key="k")
    assert (answer.memory_version, answer.replayed) == (4, False)
    assert again.generate("ada", PROMPT) == whole.generate("ada", PROMPT)


def test_a_full_store_refuses_updates_and_reading_goes_on(backbone: Backbone) -> None:
    store = FaultyStore()
    harness = Harness(backbone, store=store)
    context = text()
    harness.update("ada", context)
    before = harness.generate("ada", PROMPT)
    store.fault = StoreFull("no room left in the store")
    request_id = harness.begin_update("ada", text())
    harness.run()
    assert harness.failure(request_id).code == "store_full"
    assert harness.generate("ada", PROMPT) == before
    assert harness.update("ada", text()).memory_version == 2


@pytest.mark.parametrize("lost", [False, True])
def test_after_a_commit_of_unknown_outcome_memory_follows_the_store(backbone: Backbone, lost: bool) -> None:
    store = FaultyStore()
    harness = Harness(backbone, store=store)
    contexts = [text(), text(), text()]
    harness.update("ada", contexts[0])
    store.fault, store.lost = StoreFailed("the disk failed"), lost
    request_id = harness.begin_update("ada", contexts[1])
    harness.run()
    assert harness.failure(request_id).code == "store_failed"
    after = harness.update("ada", contexts[2])
    assert after.memory_version == (3 if lost else 2)
    expected = Harness(backbone)
    expected.update("ada", *(contexts if lost else [contexts[0], contexts[2]]))
    assert harness.generate("ada", PROMPT) == expected.generate("ada", PROMPT)


def test_a_damaged_tenant_harms_nobody_else(backbone: Backbone) -> None:
    store = FaultyStore()
    Harness(backbone, store=store).update("ada", text())
    Harness(backbone, store=store).update("bob", text())
    store.damaged.add("ada")
    harness = Harness(backbone, store=store, slots=1)
    ada, bob = harness.begin_generate("ada", PROMPT), harness.begin_generate("bob", PROMPT)
    harness.run()
    assert harness.failure(ada).code == "tenant_quarantined"
    assert isinstance(harness.final(bob), Finished)


def test_loading_beside_a_compaction_reads_what_it_left(backbone: Backbone) -> None:
    class Compacting(MemoryStore):
        """Compacts after a reader has its manifest and before it has the first blob."""

        def read(self, tenant: str, blob: BlobRef) -> bytes:
            manifest = self.manifests[tenant]
            if manifest.snapshot is None:
                pool = other.engine.residency.pool(manifest)
                super().compact(tenant, manifest.version, encode_snapshot(pool))
                raise VersionConflict("the blob was compacted away")
            return super().read(tenant, blob)

    plain = MemoryStore()
    other = Harness(backbone, store=plain, compacted_after=100)
    for _ in range(4):
        other.update("ada", text())
    expected = other.generate("ada", PROMPT)
    store = Compacting()
    store.manifests, store.blobs = dict(plain.manifests), dict(plain.blobs)
    harness = Harness(backbone, store=store)
    assert harness.generate("ada", PROMPT) == expected


def test_another_models_memory_is_refused(backbone: Backbone) -> None:
    store = MemoryStore()
    Harness(backbone, "one", store=store).update("ada", text())
    harness = Harness(backbone, "two", store=store)
    request_id = harness.begin_generate("ada", PROMPT)
    harness.run()
    assert harness.failure(request_id).code == "model_mismatch"


def test_cancel_ends_a_generation_and_frees_what_it_held(harness: Harness) -> None:
    request_id = harness.begin_generate("ada", PROMPT, 200)
    while not harness.tokens(request_id):
        harness.step()
    harness.send(Cancel(request_id))
    answer = harness.final(request_id)
    assert isinstance(answer, Finished)
    assert answer.reason == "cancelled"
    memory = harness.engine.residency.get("ada")
    assert memory is not None
    assert (memory.pins, memory.view.readers) == (0, 0)
    assert harness.engine.idle
    assert harness.engine.numbers.counters["request_success_total:cancelled"] == 1
    harness.send(Cancel("unknown"))
    stopped = harness.begin_generate("ada", PROMPT, 200)
    while not harness.tokens(stopped):
        harness.step()
    harness.send(Cancel(stopped, "stop"))
    answer = harness.final(stopped)
    assert isinstance(answer, Finished)
    assert answer.reason == "stop"
    assert harness.engine.numbers.counters["request_success_total:stop"] == 1
    queued = harness.begin_generate("ada", PROMPT, 5)
    harness.send(Cancel(queued))
    harness.run()
    assert harness.tokens(queued) == []


def test_cancel_leaves_an_update_alone(harness: Harness) -> None:
    request_id = harness.begin_update("ada", text(), text())
    harness.step()
    harness.send(Cancel(request_id))
    harness.run()
    assert isinstance(harness.final(request_id), Updated)


def test_a_passed_deadline_fails_the_request(harness: Harness) -> None:
    harness.send(Generate("late", "ada", PROMPT, Sampling(5), deadline=time.time() - 1))
    harness.run()
    assert harness.failure("late").code == "deadline_exceeded"
    assert harness.engine.idle


def test_a_deadline_ends_what_runs(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.send(Generate("long", "ada", PROMPT, Sampling(200), deadline=time.time() + 3600))
    while not harness.tokens("long"):
        harness.step()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3601)
    harness.run()
    assert harness.failure("long").code == "deadline_exceeded"
    memory = harness.engine.residency.get("ada")
    assert memory is not None
    assert (memory.pins, memory.view.readers) == (0, 0)


def test_stop_tokens_end_a_generation_unseen(harness: Harness) -> None:
    tokens = harness.generate("ada", PROMPT, 24)
    stop = tokens[5]
    request_id = harness.begin_generate("ada", PROMPT, 24, stop_tokens=(stop,))
    harness.run()
    answer = harness.final(request_id)
    assert isinstance(answer, Finished)
    assert (answer.reason, answer.stop_token) == ("stop", stop)
    assert harness.tokens(request_id) == tokens[: tokens.index(stop)]


def test_scores_agree_with_generation(harness: Harness) -> None:
    request_id = harness.begin_generate("ada", PROMPT, 10, logprobs=2)
    harness.run()
    tokens = harness.tokens(request_id)
    logprobs = [p for a in harness.of(request_id) if isinstance(a, Tokens) for p in a.logprobs or []]
    score = harness.score("ada", PROMPT, tokens)
    assert score.greedy == tokens
    assert score.logprobs == pytest.approx([p.logprob for p in logprobs], abs=1e-4)
    other = harness.score("ada", PROMPT, text(9))
    assert len(other.logprobs) == len(other.greedy) == 9
    assert other.greedy[0] == tokens[0]


@pytest.mark.parametrize("budget", [9, 16, 1000])
def test_chunks_of_prompts_and_contexts_change_nothing(backbone: Backbone, budget: int) -> None:
    whole, cut = Harness(backbone), Harness(backbone, limits=Limits(step_tokens=budget, cache_rows=1024))
    rng.seed(1)
    long_context, short, prompt = text(100), text(5), text(90)
    for harness in (whole, cut):
        harness.update("ada", long_context, short)
    assert cut.generate("ada", prompt) == whole.generate("ada", prompt)
    one, two = (h.score("ada", prompt, long_context[:20]).logprobs for h in (whole, cut))
    assert one == pytest.approx(two, abs=1e-4)


def test_full_queues_answer_at_once(backbone: Backbone) -> None:
    harness = Harness(
        backbone, limits=Limits(cache_rows=1024, queue_requests=4, queue_requests_tenant=2, queue_tokens=60)
    )
    ids = [harness.begin_generate("ada", PROMPT) for _ in range(3)]
    assert harness.failure(ids[2]).code == "tenant_queue_full"
    big = harness.begin_generate("bob", text(50))
    assert harness.failure(big).code == "server_overloaded"
    more = [harness.begin_generate(name, PROMPT) for name in ("bob", "cyd", "dan")]
    assert harness.failure(more[2]).code == "server_overloaded"
    harness.run()
    assert all(isinstance(harness.final(i), Finished) for i in [*ids[:2], *more[:2]])


def test_what_the_api_lets_through_is_checked_again(harness: Harness) -> None:
    bad = [
        harness.begin_generate("ada", [5, 320]),
        harness.begin_generate("ada", [-1]),
        harness.begin_generate("ada", []),
        harness.begin_generate("ada", PROMPT, 0),
        harness.begin_update("ada"),
        harness.begin_update("ada", [999]),
        harness.begin_score("ada", PROMPT, [321]),
    ]
    too_long = harness.begin_generate("ada", text(200), 100)
    long_context = harness.begin_update("ada", text(513))
    assert {harness.failure(i).code for i in bad} == {"invalid_request"}
    assert {harness.failure(i).code for i in (too_long, long_context)} == {"too_many_tokens"}
    assert harness.engine.idle
    assert harness.store.load("ada") is None


def test_the_first_block_of_an_empty_memory_needs_k_tokens() -> None:
    harness = Harness(load_backbone("uninitialized")[0])
    request_id = harness.begin_update("ada", text(7))
    harness.run()
    failure = harness.failure(request_id)
    assert failure.code == "context_too_short"
    assert '"short": "fill"' in failure.message
    assert harness.update("ada", text(8)).memory_version == 1


def test_tenants_are_created_listed_and_looked_at(harness: Harness) -> None:
    info = reply(harness, CreateTenant, tenant="ada", seed=42)
    assert isinstance(info, TenantInfo)
    assert (info.seed, info.memory_version) == (42, 0)
    assert reply(harness, CreateTenant, tenant="ada", seed=1).code == "tenant_exists"
    assert reply(harness, CreateTenant, tenant="eve", seed=2**40).code == "invalid_request"
    for name in ("bob", "cyd", "dan"):
        harness.update(name, text())
    page = reply(harness, ListTenants, limit=3)
    assert page == TenantList(["ada", "bob", "cyd"], "cyd", 4)
    assert reply(harness, ListTenants, after="cyd", limit=3) == TenantList(["dan"], None, 4)
    page = reply(harness, ListTenants, limit=1, only=["cyd", "nobody", "b*"])
    assert page == TenantList(["bob"], "bob", 2)
    page = reply(harness, ListTenants, after="bob", only=["cyd", "nobody", "b*"])
    assert page == TenantList(["cyd"], None, 2)
    bob = reply(harness, GetTenant, tenant="bob")
    assert (bob.memory_version, bob.tier) == (1, "resident")
    for request in (GetTenant, GetMemory, GetHistory, EraseTenant):
        assert reply(harness, request, tenant="nobody").code == "tenant_not_found"
    assert harness.store.load("nobody") is None


def test_a_tenants_seed_decides_what_it_forgets(backbone: Backbone) -> None:
    contexts = [text() for _ in range(6)]
    outcomes = []
    for seed in (1, 1, 2):
        harness = Harness(backbone)
        reply(harness, CreateTenant, tenant="ada", seed=seed)
        harness.update("ada", *contexts)
        memory = harness.engine.residency.get("ada")
        assert memory is not None
        outcomes.append(memory.born.tolist())
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] != outcomes[2]


def test_memory_and_history_tell_what_is_left(backbone: Backbone) -> None:
    store = MemoryStore()
    harness = Harness(backbone, store=store, compacted_after=3)
    for _ in range(5):
        harness.update("ada", text(), key=None)
    config = backbone.config
    view = reply(harness, GetMemory, tenant="ada")
    assert isinstance(view, MemoryView)
    assert view.memory_version == 5
    assert len(view.born) == config.num_layers
    for row in view.born:
        assert row == sorted(row)
        assert row[-config.num_tokens :] == [5] * config.num_tokens
    cold = reply(Harness(backbone, store=store), GetMemory, tenant="ada")
    assert cold == view
    history = reply(harness, GetHistory, tenant="ada", limit=3)
    assert isinstance(history, History)
    assert [u.memory_version for u in history.updates] == [5, 4, 3]
    assert history.next == 3
    older = reply(harness, GetHistory, tenant="ada", before=3)
    assert [u.memory_version for u in older.updates] == [2, 1]
    assert older.next is None
    for update in [*history.updates, *older.updates]:
        left = sum(row.count(update.memory_version) for row in view.born)
        assert update.surviving_share == pytest.approx(left / (config.num_layers * config.num_tokens))


def test_a_storm_of_updates_has_memory_for_a_few_at_a_time(backbone: Backbone) -> None:
    limits = Limits(step_tokens=16, max_running=8, cache_rows=1024, updates=2)
    harness = Harness(backbone, slots=6, limits=limits)
    names = [f"t{number}" for number in range(6)]
    for name in names:
        harness.update(name, text())
    ids = [harness.begin_update(name, text(30), text()) for name in names]
    most = 0
    while not harness.engine.idle or harness.inline.waiting:
        harness.step()
        runs = [run for i in ids if (run := harness.engine.writes.run(i)) is not None]
        working = [run for run in runs if run.block is not None or (run.current and run.current.bytes)]
        most = max(most, len(working))
    assert most == 2
    assert all(isinstance(harness.final(i), Updated) for i in ids)


def test_a_block_that_waits_for_a_reader_leaves_its_room_to_others(backbone: Backbone) -> None:
    harness = Harness(backbone, limits=Limits(cache_rows=1024, updates=1))
    for name in ("ada", "bob"):
        harness.update(name, text())
    running = harness.begin_generate("ada", PROMPT, 120)
    while not harness.tokens(running):
        harness.step()
    waiting = harness.begin_update("ada", text(), text())
    while not harness.of(waiting) or not harness.engine.updates._unpublished:
        harness.step()
    other = harness.begin_update("bob", text())
    while not harness.of(other):
        harness.step()
    assert len(harness.tokens(running)) < 120, "bob's update waited for ada's reader"
    assert not isinstance(harness.final(waiting), Updated)
    harness.run()
    assert isinstance(harness.final(waiting), Updated)


def test_the_history_of_a_memory_that_is_at_hand_needs_no_draws(backbone: Backbone) -> None:
    """Resident, warm and cold it tells the same, and after a rollback what there is then."""
    harness = Harness(backbone, slots=1, warm_bytes=2**30, compacted_after=99)
    for _ in range(6):
        harness.update("ada", text())
    with mock.patch("app.worker.tenants.surviving", side_effect=AssertionError):
        resident = reply(harness, GetHistory, tenant="ada")
        harness.generate("bob", PROMPT)
        assert harness.engine.residency.tier("ada") == "warm"
        assert reply(harness, GetHistory, tenant="ada") == resident
    assert 0 < resident.updates[-1].surviving_share < 1
    assert reply(Harness(backbone, store=harness.store), GetHistory, tenant="ada") == resident
    # the copy is of another content now, behind the engine's back
    harness.store.rollback("ada", 3, expected_version=6)
    rolled_back = reply(harness, GetHistory, tenant="ada")
    assert (rolled_back.memory_version, len(rolled_back.updates)) == (3, 3)
    assert rolled_back.updates[0].surviving_share == 1.0


def test_a_history_tells_nothing_newer_than_its_version(backbone: Backbone) -> None:
    store = MemoryStore()
    harness, other = Harness(backbone, store=store), Harness(backbone, store=store)
    harness.update("ada", text())
    history = store.history

    def overtaken(tenant: str) -> list[BlockRecord]:
        with mock.patch.object(store, "history", history):
            other.update("ada", text())
        return history(tenant)

    with mock.patch.object(store, "history", overtaken):
        told = reply(harness, GetHistory, tenant="ada")
    assert len(history("ada")) == 2
    assert told.memory_version == 1
    assert [update.memory_version for update in told.updates] == [1]
    assert told.updates[0].surviving_share == 1.0


def test_erase_fails_what_runs_and_leaves_nothing(harness: Harness) -> None:
    harness.update("ada", text())
    running = harness.begin_generate("ada", PROMPT, 200)
    writing = harness.begin_update("ada", text(), text())
    waiting = harness.begin_generate("ada", PROMPT)
    while len(harness.tokens(running)) < 2:
        harness.step()
    other = harness.begin_generate("bob", PROMPT)
    harness.send(EraseTenant("erase", "ada"))
    refused = harness.begin_generate("ada", PROMPT)
    harness.run()
    receipt = harness.final("erase")
    assert isinstance(receipt, Reply)
    assert isinstance(receipt.body, Erased)
    assert receipt.body.cancelled == 3
    assert {harness.failure(i).code for i in (running, writing, waiting, refused)} == {"tenant_erased"}
    assert isinstance(harness.final(other), Finished)
    assert harness.store.load("ada") is None
    assert harness.engine.residency.tier("ada") == "cold"
    assert harness.generate("ada", PROMPT) == harness.generate("bob", PROMPT), "it begins anew"
    assert harness.store.load("ada").version == 0  # type: ignore[union-attr]


def test_draining_finishes_what_runs_and_takes_nothing_new(harness: Harness) -> None:
    running = harness.begin_generate("ada", PROMPT, 30)
    writing = harness.begin_update("bob", text(), text())
    harness.step()
    harness.send(Drain(5.0))
    late = harness.begin_generate("ada", PROMPT)
    harness.run()
    assert harness.failure(late).code == "worker_unavailable"
    assert isinstance(harness.final(running), Finished)
    assert isinstance(harness.final(writing), Updated)


def test_when_the_time_to_drain_is_over_every_request_is_told(harness: Harness) -> None:
    """What is being written is written: its last block makes it an update that is done, an earlier one does not."""
    running = harness.begin_generate("ada", PROMPT, 200)
    behind = harness.begin_update("ada", text())
    whole, part = harness.begin_update("bob", text()), harness.begin_update("eve", text(), text())
    while not harness.inline.waiting or not harness.tokens(running):
        harness.step()
    waiting = harness.begin_generate("bob", PROMPT)
    harness.send(Drain(0.0))
    harness.engine.end()
    harness.run()
    assert {harness.failure(i).code for i in (running, waiting, part)} == {"worker_unavailable"}
    assert isinstance(harness.final(whole), Updated)
    assert isinstance(harness.final(behind), Updated | Failed)
    versions = {name: harness.store.load(name).version for name in ("bob", "eve")}  # type: ignore[union-attr]
    assert versions == {"bob": 1, "eve": 1}
    assert harness.engine.idle


def test_a_block_that_is_not_finite_is_never_committed(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(backbone)
    harness.update("ada", text())
    before = harness.generate("ada", PROMPT)
    original = type(backbone).begin_update

    def poisoned(self: Backbone, tail: Any, length: int) -> Any:
        update = original(self, tail, length)
        monkeypatch.setattr(update, "tail", update.tail * torch.nan)
        return update

    with monkeypatch.context() as patch:
        patch.setattr(type(backbone), "begin_update", poisoned)
        request_id = harness.begin_update("ada", text())
        harness.run()
    assert harness.failure(request_id).code == "internal_error"
    assert harness.store.load("ada").version == 1  # type: ignore[union-attr]
    assert harness.generate("ada", PROMPT) == before
