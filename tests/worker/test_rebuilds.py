"""Rebuilds: the kept texts told anew, by the same model or another, and the old memory untouched until the end."""

from __future__ import annotations

import random

import msgspec
import pytest
import torch

from app.messages import (
    Context,
    Erased,
    EraseTenant,
    Failed,
    Finished,
    GetHistory,
    GetTexts,
    RebuildTenant,
    RebuiltContext,
    Reply,
    TenantInfo,
    Texts,
    Update,
    Updated,
    UpdateProgress,
)
from app.model.backbone import Backbone
from tests.fakes import MemoryStore
from tests.harness import NAMES, Harness, load_backbone
from tests.worker.test_memories import PROMPT, begin, pool, reply

rng = random.Random(3)


def text(length: int = 20) -> list[int]:
    return [rng.randrange(3, 300) for _ in range(length)]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("two-adapters")[0]


@pytest.fixture(scope="module")
def other() -> Backbone:
    """Of another shape: fewer layers or wider ones, another pool."""
    return load_backbone("short-context")[0]


def spelled(tokens: list[int]) -> str:
    """A text that tells its tokens, a line a context."""
    return " ".join(map(str, tokens)) + "\n"


def tell(harness: Harness, tenant: str, *contexts: list[int], key: str | None = None) -> Updated | Failed:
    request_id = harness.id()
    harness.send(Update(request_id, tenant, [Context(c, spelled(c)) for c in contexts], key))
    harness.run()
    answer = harness.final(request_id)
    assert isinstance(answer, Updated | Failed)
    return answer


def message(harness: Harness, tenant: str) -> RebuildTenant:
    """As the API makes it."""
    texts = reply(harness, GetTexts, tenant)
    assert isinstance(texts, Texts), texts
    contexts = [
        RebuiltContext([int(word) for word in line.split()], line, kept.memory_version)
        for kept in texts.texts
        for line in kept.text.splitlines(keepends=True)
    ]
    return RebuildTenant(harness.id(), tenant, texts.lineage, texts.memory_version, contexts)


def rebuild(harness: Harness, tenant: str) -> TenantInfo | Failed:
    request = message(harness, tenant)
    harness.send(request)
    harness.run()
    answer = harness.final(request.id)
    if isinstance(answer, Failed):
        return answer
    assert isinstance(answer, Reply)
    assert isinstance(answer.body, TenantInfo)
    progress = [a for a in harness.of(request.id) if isinstance(a, UpdateProgress)]
    assert [p.done for p in progress] == list(range(1, len(request.contexts) + 1))
    assert {p.total for p in progress} <= {len(request.contexts)}
    return answer.body


def fill(harness: Harness, tenant: str, updates: int = 9) -> None:
    """Updates of one context and of two, with keys and without."""
    for number in range(updates):
        contexts = [text() for _ in range(1 + number % 2)]
        tell(harness, tenant, *contexts, key=None if number % 3 == 0 else f"key {number}")


@pytest.mark.parametrize("name", NAMES)
def test_the_same_model_makes_the_same_memory(name: str) -> None:
    backbone = load_backbone(name)[0]
    harness = Harness(backbone)
    for number in range(2 * backbone.config.num_blocks + 1):
        tell(harness, "ada", *[text(max(20, backbone.config.num_tokens)) for _ in range(1 + number % 2)])
    before, manifest = pool(harness, "ada"), harness.store.load("ada")
    expected = harness.generate("ada", PROMPT)
    assert manifest is not None
    history = reply(harness, GetHistory, "ada").updates
    info = rebuild(harness, "ada")
    assert isinstance(info, TenantInfo), info
    assert (info.memory_version, info.lineage, info.created) == (manifest.version, 1, manifest.created)
    after = pool(harness, "ada")
    assert torch.equal(after.hidden, before.hidden)
    assert torch.equal(after.born, before.born)
    assert harness.generate("ada", PROMPT) == expected
    assert reply(harness, GetHistory, "ada").updates == history
    again = tell(harness, "ada", text(max(20, backbone.config.num_tokens)))
    assert isinstance(again, Updated), "the memory from before the rebuild is still at work"


def test_keys_are_known_after_a_rebuild(backbone: Backbone, other: Backbone) -> None:
    """Also under another model: a retry of a whole update is answered, and changes nothing."""
    here = Harness(backbone, "here")
    contexts = [text(), text()]
    tell(here, "ada", text())
    tell(here, "ada", *contexts, key="k")
    there = Harness(other, "there", store=here.store)
    info = rebuild(there, "ada")
    assert isinstance(info, TenantInfo), info
    again = tell(there, "ada", *contexts, key="k")
    assert isinstance(again, Updated)
    assert (again.replayed, again.memory_version, again.blocks) == (True, 3, 2)
    conflict = tell(there, "ada", text(), key="k")
    assert isinstance(conflict, Failed)
    assert conflict.code == "idempotency_conflict"


def test_another_model_takes_over_a_memory(backbone: Backbone, other: Backbone) -> None:
    here = Harness(backbone, "here")
    told = [text() for _ in range(5)]
    for tokens in told:
        tell(here, "ada", tokens)
    there = Harness(other, "there", store=here.store)
    refused = there.begin_generate("ada", PROMPT)
    there.run()
    assert there.failure(refused).code == "model_mismatch"
    assert "rebuil" in there.failure(refused).message
    info = rebuild(there, "ada")
    assert isinstance(info, TenantInfo), info
    assert (info.memory_version, info.lineage) == (5, 1)
    fresh = Harness(other)
    for tokens in told:
        tell(fresh, "ada", tokens)
    assert torch.equal(pool(there, "ada").hidden, pool(fresh, "ada").hidden)
    assert there.generate("ada", PROMPT) == fresh.generate("ada", PROMPT)
    more = text()
    for harness in (there, fresh):
        tell(harness, "ada", more)
    assert torch.equal(pool(there, "ada").hidden, pool(fresh, "ada").hidden)
    late = here.begin_generate("ada", text())
    here.engine.residency.renew("ada")
    here.run()
    assert here.failure(late).code == "model_mismatch"


def test_a_memory_that_was_told_nothing_is_rebuilt(backbone: Backbone, other: Backbone) -> None:
    here = Harness(backbone, "here")
    here.generate("ada", PROMPT)
    there = Harness(other, "there", store=here.store)
    info = rebuild(there, "ada")
    assert isinstance(info, TenantInfo), info
    assert (info.memory_version, info.lineage) == (0, 1)
    assert there.generate("ada", PROMPT) == Harness(other).generate("ada", PROMPT)


def test_requests_around_a_rebuild_keep_their_order(backbone: Backbone, other: Backbone) -> None:
    """What came before it fails as it must; what comes after it finds the rebuilt memory."""
    here = Harness(backbone, "here")
    tell(here, "ada", told := text())
    there = Harness(other, "there", store=here.store)
    request = message(there, "ada")
    before = there.begin_generate("ada", PROMPT)
    there.send(request)
    after = there.begin_generate("ada", PROMPT)
    update = there.begin_update("ada", text())
    there.run()
    assert there.failure(before).code == "model_mismatch"
    assert isinstance(there.final(request.id), Reply)
    fresh = Harness(other)
    tell(fresh, "ada", told)
    assert there.tokens(after) == fresh.generate("ada", PROMPT)
    assert isinstance(there.final(update), Updated)


def test_a_running_generation_and_other_tenants_go_on(backbone: Backbone) -> None:
    harness = Harness(backbone)
    fill(harness, "ada", 3)
    expected = [harness.generate(name, PROMPT, 60) for name in ("ada", "bob")]
    running = [harness.begin_generate(name, PROMPT, 60) for name in ("ada", "bob")]
    while not all(len(harness.tokens(r)) > 3 for r in running):
        harness.step()
    request = message_while_running(harness, "ada")
    harness.send(request)
    while not harness.of(request.id):
        harness.step()
    assert all(len(harness.tokens(r)) < 60 for r in running)
    harness.run()
    assert [harness.tokens(r) for r in running] == expected
    assert isinstance(harness.final(request.id), Reply)
    finished = harness.final(running[0])
    assert isinstance(finished, Finished)
    assert finished.memory_version == 4


def message_while_running(harness: Harness, tenant: str) -> RebuildTenant:
    idle = Harness(harness.engine.backbone, store=harness.store)
    request = message(idle, tenant)
    return RebuildTenant("rebuild", tenant, request.lineage, request.memory_version, request.contexts)


# ---------------------------------------------------------------- nothing or all


def test_nothing_is_stored_before_all_is(backbone: Backbone, other: Backbone) -> None:
    """At every step of a rebuild the store is as it was; a server that dies there has lost nothing."""
    here = Harness(backbone, "here", compacted_after=99)
    fill(here, "ada")
    before = here.store.load("ada")
    expected, stored = here.generate("ada", PROMPT), dict(here.store.blobs)  # type: ignore[attr-defined]
    there = Harness(other, "there", store=here.store)
    request = message(there, "ada")
    there.send(request)
    steps = 0
    while not isinstance((there.of(request.id) or [None])[-1], Reply):
        if there.store.load("ada") == before:
            assert here.store.blobs == stored  # type: ignore[attr-defined]
            steps += 1
        there.step()
    assert steps > len(request.contexts)
    assert there.store.load("ada") != before
    # the same, given up halfway: the process is gone, and the old model is served again
    here.store.manifests["ada"], here.store.blobs = before, stored  # type: ignore[attr-defined]
    half = Harness(other, "there", store=here.store)
    half.send(message(half, "ada"))
    for _ in range(steps // 2):
        half.step()
    again = Harness(backbone, "here", store=here.store)
    assert again.generate("ada", PROMPT) == expected


def test_rebuilds_that_cannot_be(backbone: Backbone) -> None:
    harness = Harness(backbone)
    assert reply(harness, GetTexts, "nobody").code == "tenant_not_found"
    tell(harness, "ada", text())
    good = message(harness, "ada")
    harness.update("ada", text())
    before = harness.store.load("ada")
    # left alone unless it is forced
    texts = reply(harness, GetTexts, "ada")
    assert isinstance(texts, Texts)
    assert (texts.current, texts.memory_version, texts.texts) == (True, 2, [])
    other_model = Harness(backbone, "another", store=harness.store)
    assert reply(other_model, GetTexts, "ada").code == "texts_not_kept"
    for forced in (good, message(harness, "ada")):
        harness.send(forced)
        harness.run()
        assert harness.failure(forced.id).code == "texts_not_kept"
    tell(harness, "bob", text())
    stale = message(harness, "bob")
    tell(harness, "bob", text())
    harness.send(stale)
    harness.run()
    assert harness.failure(stale.id).code == "version_conflict"
    wrong = RebuildTenant("wrong", "bob", 0, 2, [RebuiltContext([10**6], "", 1)])
    harness.send(wrong)
    harness.run()
    assert harness.failure("wrong").code == "invalid_request"
    assert harness.store.load("ada") == before
    assert [harness.store.load(name).lineage for name in ("ada", "bob")] == [0, 0]  # type: ignore[union-attr]


def test_a_memory_larger_than_the_tenant_s_limit_is_not_rebuilt(backbone: Backbone, other: Backbone) -> None:
    harness = Harness(backbone)
    tell(harness, "ada", text(40))
    before = harness.store.load("ada")
    later = Harness(other, "another", store=harness.store)
    pool_bytes = other.weights.memory.nbytes
    for most, refused in ((pool_bytes - 1, True), (pool_bytes, False)):
        request = message(later, "ada")
        harness.id()
        later.send(msgspec.structs.replace(request, id=f"at most {most}", most_bytes=most))
        later.run()
        answer = later.final(f"at most {most}")
        if refused:
            assert isinstance(answer, Failed)
            assert answer.code == "quota_exceeded"
            assert harness.store.load("ada") == before
        else:
            assert isinstance(answer, Reply)


def test_an_update_in_the_queue_goes_before_a_rebuild(backbone: Backbone) -> None:
    harness = Harness(backbone)
    tell(harness, "ada", text())
    request, tokens = message(harness, "ada"), text()
    harness.send(Update("update", "ada", [Context(tokens, spelled(tokens))]))
    harness.send(request)
    harness.run()
    assert isinstance(harness.final("update"), Updated)
    assert harness.failure(request.id).code == "version_conflict"
    assert harness.store.load("ada").version == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("forgotten", [True, False])
def test_texts_may_be_missing_of_what_is_forgotten(backbone: Backbone, forgotten: bool) -> None:
    """The store keeps the records of the newest blocks only."""
    harness = Harness(backbone, compacted_after=4)
    blocks = 64 if forgotten else 8
    told = [text() for _ in range(blocks)]
    for tokens in told:
        tell(harness, "ada", tokens)
    store = harness.store
    assert isinstance(store, MemoryStore)
    del store.archived["ada"][:2]
    info = rebuild(harness, "ada")
    if not forgotten:
        assert isinstance(info, Failed)
        assert info.code == "texts_not_kept"
        return
    assert isinstance(info, TenantInfo), info
    assert info.memory_version == blocks
    born = pool(harness, "ada").born
    assert int(born.min()) > 2
    assert [r.version for r in store.history("ada")] == list(range(3, blocks + 1))
    tell(harness, "ada", text())


def test_an_erasure_ends_a_rebuild_at_any_point(backbone: Backbone) -> None:
    for steps in range(14):
        harness = Harness(backbone)
        fill(harness, "ada", 3)
        request = message(harness, "ada")
        harness.send(request)
        for _ in range(steps):
            harness.step()
        if any(isinstance(a, Reply) for a in harness.of(request.id)):
            assert steps > 5
            return
        erase, told = begin(harness, EraseTenant, "ada"), len(harness.of(request.id))
        harness.run()
        assert harness.failure(request.id).code == "tenant_erased"
        assert len(harness.of(request.id)) <= told + 1, "it went on"
        erased = harness.final(erase)
        assert isinstance(erased, Reply)
        assert isinstance(erased.body, Erased)
        assert harness.store.load("ada") is None
        assert tell(harness, "ada", text()).memory_version == 1  # type: ignore[union-attr]
    raise AssertionError("the rebuild never ended")
