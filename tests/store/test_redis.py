"""What only the Redis store has: a server that must suit it, leases, fences, chunks, and a connection that breaks."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import redis

from app.errors import (
    StoreFailed,
    StoreFull,
    TenantElsewhere,
    TenantNotFound,
    TenantQuarantined,
    VersionConflict,
)
from app.store import redis_blobs
from app.store.base import BlobRef, Manifest
from app.store.home import tenant_id
from app.store.redis import RedisStore
from app.store.redis_server import parse_url
from app.store.url import open_store
from tests.store.redisserver import RedisServer
from tests.store.test_contract import whole


def manifest(tenant: str = "ada") -> Manifest:
    return Manifest(tenant, 1, "fingerprint", 0.0)


def commit(store: Any, version: int, data: bytes = b"block", tenant: str = "ada") -> Manifest:
    done: Manifest = store.commit(tenant, version - 1, data, time=0.0, tokens=16)
    return done


@pytest.fixture
def opened(redis_server: RedisServer) -> Iterator[Any]:
    """Opens stores on the server; ``lease`` and other parameters of the URL by name."""
    with ExitStack() as stack:

        def open_one(**parameters: object) -> RedisStore:
            query = "&".join(f"{name}={value}" for name, value in parameters.items())
            store = open_store(f"{redis_server.url}?{query}")
            assert isinstance(store, RedisStore)
            stack.callback(store.close)
            return store

        yield open_one


# ---------------------------------------------------------------- the server


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"maxmemory-policy": "allkeys-lru", "maxmemory": "100mb"}, "maxmemory-policy noeviction"),
        ({"appendonly": "no"}, "appendonly yes"),
        ({"appendfsync": "no"}, "appendfsync always or everysec"),
        ({"requirepass": "hush"}, "wants a password"),
    ],
)
def test_a_server_that_would_lose_memories_is_refused(
    tmp_path: Path, config: dict[str, str], message: str
) -> None:
    server = RedisServer(tmp_path, **config)
    try:
        with pytest.raises(StoreFailed, match=message) as refused:
            open_store(server.url)
        assert "hush" not in str(refused.value)
        assert str(server.port) not in str(refused.value)
        if "appendonly" in config:
            open_store(f"{server.url}?persistence=none").close()
        if "requirepass" in config:
            with pytest.raises(StoreFailed, match="refused the user or password") as refused:
                open_store(server.url.replace("127", ":wrong@127", 1))
            assert "wrong" not in str(refused.value)
            open_store(server.url.replace("127", ":hush@127", 1)).close()
    finally:
        server.stop()


def test_nobody_at_the_address() -> None:
    with pytest.raises(StoreFailed, match="cannot be reached"):
        open_store("redis://127.0.0.1:1/0?timeout=0.5")


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"redis_version": "5.0.7", "valkey_version": ""}, "6.2 or newer"),
        ({"redis_version": "7.0.0", "valkey_version": ""}, "appendfsync always"),
        ({"role": "slave"}, "replica"),
        ({"cluster_enabled": 1}, "Cluster"),
    ],
)
def test_servers_that_cannot_keep_memories(
    redis_server: RedisServer, info: dict[str, Any], message: str
) -> None:
    true_info = redis.Redis.info

    def told(self: Any, *section: Any) -> Any:
        return true_info(self, *section) | info

    # an old server would not be one that syncs always
    with (
        mock.patch.object(redis.Redis, "info", told),
        mock.patch.object(redis.Redis, "config_get", lambda self, name: {name: "everysec"}),
        pytest.raises(StoreFailed, match=message),
    ):
        open_store(redis_server.url)


def test_a_server_that_syncs_every_second_is_waited_for(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, appendfsync="everysec")
    try:
        store = open_store(server.url)
        store.create(manifest())
        commit(store, 1)
        server.kill()
        server.start()
        found = store.load("ada")
        assert found is not None
        assert found.version == 1
        store.close()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def lazy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server that syncs every second, with a test at a time in it."""
    server = RedisServer(tmp_path_factory.mktemp("lazy"), appendfsync="everysec")
    yield server
    server.stop()


@pytest.fixture
def waiting(lazy: RedisServer) -> Iterator[Any]:
    """A store on it with two tenants."""
    with lazy.client() as client:
        client.flushall()
        client.config_set("appendfsync", "everysec")
    store = open_store(lazy.url)
    for tenant in ("ada", "bob"):
        store.create(manifest(tenant))
    yield store
    store.close()


def waits(server: RedisServer) -> int:
    """How often the server was asked to answer when its file is on the disk."""
    with server.client() as client:
        told = client.info("commandstats").get("cmdstat_waitaof", {"calls": 0})
    return int(told["calls"])


def test_a_server_that_does_not_sync_while_it_writes_its_file_anew_is_waited_for(
    redis_server: RedisServer,
) -> None:
    with redis_server.client() as client:
        client.config_set("no-appendfsync-on-rewrite", "yes")
        try:
            store = open_store(redis_server.url)
            store.create(manifest())
            before = waits(redis_server)
            commit(store, 1)
            assert waits(redis_server) == before + 1
            store.close()
            # one of before WAITAOF has nothing to be asked with
            true_info = redis.Redis.info
            old = {"redis_version": "7.0.0", "valkey_version": ""}
            with (
                mock.patch.object(redis.Redis, "info", lambda self, *s: true_info(self, *s) | old),
                pytest.raises(StoreFailed, match="no-appendfsync-on-rewrite no"),
            ):
                open_store(redis_server.url)
        finally:
            client.config_set("no-appendfsync-on-rewrite", "no")


def test_a_commit_beside_a_check_waits_for_the_disk_and_for_the_check(
    lazy: RedisServer, waiting: Any
) -> None:
    checking, go_on = threading.Event(), threading.Event()
    ask = waiting._server.client.config_get

    def slow(*names: str) -> Any:
        checking.set()
        go_on.wait(30)
        return ask(*names)

    first = threading.Thread(target=commit, args=(waiting, 1, b"block", "bob"))
    second = threading.Thread(target=commit, args=(waiting, 1))
    # as after a new connection
    waiting._server._unchecked = True
    with mock.patch.object(waiting._server.client, "config_get", slow):
        first.start()
        assert checking.wait(30)
        before = waits(lazy)
        second.start()
        until(lambda: waits(lazy) > before)
        second.join(0.1)
        assert second.is_alive()
        go_on.set()
        first.join()
        second.join()
    assert [waiting.load(tenant).version for tenant in ("ada", "bob")] == [1, 1]


def test_behind_a_check_that_failed_commits_wait_as_before(lazy: RedisServer, waiting: Any) -> None:
    waiting._server._unchecked = True
    with (
        mock.patch.object(waiting._server.client, "config_get", side_effect=redis.ConnectionError("cut")),
        pytest.raises(StoreFailed),
    ):
        commit(waiting, 1, tenant="bob")
    before = waits(lazy)
    commit(waiting, 1)
    assert waits(lazy) == before + 1


def test_the_first_commit_to_a_server_that_has_become_lazy_is_not_acknowledged(
    lazy: RedisServer, waiting: Any
) -> None:
    with lazy.client() as client:
        client.config_set("appendfsync", "always")
        waiting._server._unchecked = True
        commit(waiting, 1)
        before = waits(lazy)
        commit(waiting, 2)
        assert waits(lazy) == before
        client.config_set("appendfsync", "everysec")
        client.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises(StoreFailed, match="not waited for"):
        commit(waiting, 3)
    version = waiting.claim("ada").version
    before = waits(lazy)
    commit(waiting, version + 1)
    assert waits(lazy) == before + 1


def test_a_server_that_comes_back_as_another_is_refused(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    try:
        store = open_store(server.url)
        store.create(manifest())
        for name, bad, good, message in (
            ("appendonly", "no", "yes", "append-only"),
            ("maxmemory-policy", "allkeys-lru", "noeviction", "evicts"),
        ):
            found = store.claim("ada")
            assert found is not None
            with server.client() as client:
                client.config_set(name, bad)
                client.client_kill_filter(_type="normal", skipme=True)
            with pytest.raises(StoreFailed, match=message):
                commit(store, found.version + 1)
            with server.client() as client:
                client.config_set(name, good)
            found = store.claim("ada")
            assert found is not None
            commit(store, found.version + 1)
        store.close()
    finally:
        # it would not stop politely while it writes its file anew
        server.kill()


def test_what_is_not_confirmed_is_not_acknowledged(opened: Any) -> None:
    store = opened()
    store.create(manifest())
    store._server.waits = True
    # as WAITAOF answers whose time is over: on no disk, neither the server's own nor a replica's
    with (
        mock.patch.object(store._server, "wait", lambda pipeline: pipeline.eval("return {0, 0}", 0)),
        pytest.raises(StoreFailed, match="did not confirm"),
    ):
        commit(store, 1)
    with mock.patch.object(store._server, "wait", lambda pipeline: pipeline.eval("return {1, 0}", 0)):
        version = store.claim("ada").version + 1
        assert commit(store, version).version == version


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:6379/0?persistence=some",
        "redis://127.0.0.1:6379/0?prefix=a:b",
        "redis://127.0.0.1:6379/0?lease=0",
        "redis://127.0.0.1:6379/0?lease=soon",
        "redis://127.0.0.1:port/0",
        "redis://127.0.0.1:6379/0?socket_timeout=1",
        "redis://127.0.0.1:6379/0?decode_responses=true",
        "redis://127.0.0.1:6379/0?retry_on_error=ConnectionError",
        "redis://:hush#x@127.0.0.1:6379/0",
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="store") as refused:
        open_store(url)
    assert "hush" not in "".join(traceback.format_exception(refused.value)).replace(repr(url), "")


def test_urls() -> None:
    options = parse_url("valkeys://:secret@host:7/3?prefix=p&persistence=none&lease=2&timeout=3")
    assert options.url == "rediss://:secret@host:7/3"
    assert (options.prefix, options.persistence, options.lease, options.timeout) == ("p", False, 2.0, 3.0)
    assert parse_url("redis+unix:///run/redis.sock?db=1").url == "unix:///run/redis.sock?db=1"


def test_names_never_reach_a_key(opened: Any, redis_server: RedisServer) -> None:
    store = opened(prefix="other")
    store.create(manifest("secret-name"))
    commit(store, 1, tenant="secret-name")
    with redis_server.client() as client:
        keys = [key.decode() for key in client.keys("*")]
    assert all(key.startswith("other:") and "secret-name" not in key for key in keys)
    assert any(tenant_id("secret-name") in key for key in keys)


# ---------------------------------------------------------------- leases and fences


def test_one_server_at_a_time_writes_a_tenant(opened: Any) -> None:
    first, second = opened(lease=20), opened(lease=20)
    first.create(manifest())
    assert first.claimed("ada")
    assert not second.claimed("ada")
    with pytest.raises(TenantElsewhere) as elsewhere:
        second.claim("ada")
    assert 0 < (elsewhere.value.retry_after or 0) <= 21
    with pytest.raises(TenantElsewhere):
        commit(second, 1)
    # reading is free
    assert second.load("ada") == manifest()
    # another tenant is nobody's
    second.create(manifest("bob"))
    assert second.claimed("bob")


def until(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def test_an_idle_holder_gives_way(opened: Any) -> None:
    first, second = opened(lease=2), opened(lease=2)
    first.create(manifest())
    commit(first, 1)
    first.release("ada")

    def taken() -> bool:
        try:
            found: Manifest = second.claim("ada")
        except TenantElsewhere:
            return False
        return found.version == 1

    until(taken)
    commit(second, 2)
    assert not first.claimed("ada")
    with pytest.raises(TenantElsewhere):
        commit(first, 2)
    assert first.load("ada").version == 2


def test_a_look_at_an_idle_claim_does_not_keep_it(opened: Any) -> None:
    store = opened()
    assert not store.holds("ada")
    store.create(manifest())
    store.release("ada")
    assert store.holds("ada")
    claim = store._redis_manifests.leases._claims["ada"]
    assert claim.idle
    # as whoever needs the tenant asks
    assert store.claimed("ada")
    assert not claim.idle


def test_a_claim_is_renewed_while_it_is_used(opened: Any) -> None:
    first, second = opened(lease=5), opened(lease=5)
    first.create(manifest())
    leases = first._redis_manifests.leases
    for _ in range(2):
        before = leases._claims["ada"].until
        until(lambda before=before: leases._claims["ada"].until > before)
        assert first.claimed("ada")
        with pytest.raises(TenantElsewhere):
            second.claim("ada")


def test_a_holder_that_slept_can_neither_commit_nor_believe_what_it_knew(
    opened: Any, redis_server: RedisServer
) -> None:
    """As after SIGSTOP: its renewals stop, and it does not notice."""
    first, second = opened(), opened()
    first.create(manifest())
    old = commit(first, 1)
    leases = first._redis_manifests.leases
    lapse(first, redis_server, "ada")
    second.claim("ada")
    commit(second, 2, b"theirs")
    assert not first.claimed("ada")
    # even if its clock stood still: the claim's number is not the last
    leases._claims["ada"].until = time.monotonic() + 100
    assert first.claimed("ada")
    with pytest.raises((VersionConflict, TenantElsewhere)):
        first._manifests.swap(old, old, [])
    leases._claims.clear()
    assert first.load("ada").version == 2
    assert second.load("ada").blocks[-1].blob.size == len(b"theirs")


def test_a_commit_that_may_still_arrive_is_fenced_off(opened: Any) -> None:
    """Its answer was lost; whatever the server does with it later must not come on top of what follows."""
    store = opened()
    store.create(manifest())
    late = store._redis_manifests.leases.held("ada")
    with (
        mock.patch.object(store._server, "once", side_effect=StoreFailed("cut")),
        pytest.raises(StoreFailed),
    ):
        commit(store, 1)
    assert store.claim("ada").version == 0
    assert store._redis_manifests.leases.held("ada") not in (None, late)


def lapse(store: RedisStore, server: RedisServer, tenant: str) -> None:
    """The claim is over, as after a sleep, and the store has not noticed."""
    leases = store._redis_manifests.leases
    leases._stop.set()
    leases._thread.join()
    leases._claims[tenant].until = 0.0
    with server.client() as client:
        client.delete(store._keys.of(tenant, "lease"))


def test_a_new_claim_makes_nothing_old_believed(opened: Any, redis_server: RedisServer) -> None:
    first, second = opened(), opened()
    first.create(manifest())
    commit(first, 1)
    number = first.claimed("ada")
    lapse(first, redis_server, "ada")
    assert not first.claimed("ada")
    commit(second, 2)
    second.close()
    seen = []
    sweep = first._redis_blobs.sweep

    def look(swept: Manifest) -> None:
        # another thread's look, while the claim is half done
        seen.append(first.load("ada").version)
        sweep(swept)

    with mock.patch.object(first._redis_blobs, "sweep", look):
        assert first.claim("ada").version == 2
    assert seen == [2]
    assert first.claimed("ada") not in (None, number)


def test_a_claim_given_up_can_be_taken_back_meanwhile(opened: Any, redis_server: RedisServer) -> None:
    store = opened()
    store.create(manifest())
    leases = store._redis_manifests.leases
    store.release("ada")
    give = leases._give

    def late(tenant: str, claim: Any) -> None:
        store.claim("ada")
        give(tenant, claim)

    with mock.patch.object(leases, "_give", late):
        leases._give_way("ada", leases._claims["ada"])
    with redis_server.client() as client:
        assert client.get(store._keys.of("ada", "lease")) == leases.held("ada") is not None


def test_an_idle_claim_lapses_and_is_forgotten(opened: Any, redis_server: RedisServer) -> None:
    store = opened(lease=0.3)
    store.create(manifest())
    store.claim("nobody")
    assert store.history("ada") == []
    store.release("ada")
    store.release("nobody")
    leases = store._redis_manifests.leases
    until(lambda: not leases._claims and not store._redis_manifests._cache)
    with redis_server.client() as client:
        until(lambda: not [key for key in client.keys("*") if b"lease" in key])
        # names of tenants that never were leave nothing
        assert not [key for key in client.keys("*") if tenant_id("nobody").encode() in key]
    assert store.load("ada") == manifest()


def test_looking_claims_nothing(opened: Any) -> None:
    first, second = opened(), opened()
    first.create(manifest())
    found = commit(first, 1, b"some block")
    assert [record.version for record in second.history("ada")] == [1]
    assert second.read("ada", found.blocks[0].blob) == b"some block"
    assert second.times("ada") == [0.0]
    assert second.usage("ada") == first.usage("ada")
    first.rollback("ada", 0, expected_version=1)
    with pytest.raises(VersionConflict):
        second.read("ada", found.blocks[0].blob)
    assert not second.claimed("ada")
    assert first.claimed("ada")


def test_renewing_goes_on_after_errors(opened: Any) -> None:
    store = opened(lease=0.3)
    store.create(manifest())
    leases = store._redis_manifests.leases
    standing, failures, rounds = leases._standing, [redis.ConnectionError("cut"), OSError("gone")], []

    def failing() -> Any:
        if failures:
            raise failures.pop()
        rounds.append(standing())
        return rounds[-1]

    with mock.patch.object(leases, "_standing", failing):
        until(lambda: rounds)


def test_a_broken_connection_is_nobody_elses_trouble(opened: Any) -> None:
    store = opened()
    server, answers = store._server, []
    begun = threading.Event()

    def wait() -> None:
        begun.set()
        answers.append(server.once("waiting", lambda: server.client.blpop("nothing", timeout=1)))

    thread = threading.Thread(target=wait)
    thread.start()
    begun.wait()
    time.sleep(0.1)
    broken = iter([redis.ConnectionError("cut")])

    def call() -> str:
        for error in broken:
            raise error
        return "answer"

    assert server.again("asking", call) == "answer"
    thread.join(10)
    assert answers == [None]


def test_what_may_not_be_on_the_disk_yet_is_not_believed(opened: Any) -> None:
    first, second = opened(), opened()
    first.create(manifest())
    commit(first, 1)
    first.close()
    second._server.waits = True
    with (
        mock.patch.object(second._server, "durable", side_effect=StoreFailed("not confirmed")),
        pytest.raises(StoreFailed, match="not confirmed"),
    ):
        second.claim("ada")
    assert not second.claimed("ada")
    second._server.waits = False
    assert second.claim("ada").version == 1


def test_an_erasure_whose_answer_was_lost_is_done(opened: Any, redis_server: RedisServer) -> None:
    store = opened()
    store.create(manifest())
    commit(store, 1)
    settled, lost = store._server.settled, []

    def losing(source: str, keys: list[str], args: list[Any]) -> Any:
        answer = settled(source, keys, args)
        if source not in lost:
            lost.append(source)
            raise redis.ConnectionError("cut")
        return answer

    with mock.patch.object(store._server, "settled", losing):
        receipt = store.erase("ada")
    assert len(lost) == 2
    assert receipt is not None
    assert receipt.blobs == 1
    with redis_server.client() as client:
        assert not [key for key in client.keys("*") if tenant_id("ada").encode() in key]
    assert list(store.tenants()) == []


def test_an_erasure_whose_answer_was_lost_is_not_taken_for_undone(opened: Any) -> None:
    store = opened()
    store.create(manifest())
    commit(store, 1)
    again = store._server.again

    def cut(doing: str, call: Any) -> Any:
        answer = again(doing, call)
        if doing == "erasing a tenant":
            raise StoreFailed("the answer is lost")
        return answer

    with mock.patch.object(store._server, "again", cut), pytest.raises(StoreFailed):
        store.erase("ada")
    assert store.claim("ada") is None
    assert store.load("ada") is None
    assert list(store.tenants()) == []
    assert store.erase("ada") is not None


# ---------------------------------------------------------------- blobs, damage, room


@pytest.mark.parametrize("does", ["compact", "fork"])
def test_what_a_server_writes_that_slept_meanwhile_is_removed(
    opened: Any, redis_server: RedisServer, does: str
) -> None:
    """Its claim is over, another server has erased the tenant, and it wakes with chunks of a blob left to write."""
    first, second = opened(), opened()
    blobs = first._redis_blobs
    target, part = ("ada", "_put_chunk") if does == "compact" else ("bob", "_share_chunk")
    write, calls = getattr(blobs, part), 0

    def sleepy(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            lapse(first, redis_server, target)
            if does == "fork":
                second.create(manifest("bob"))
            assert second.erase(target) is not None
        return write(*arguments)

    with mock.patch.object(redis_blobs, "CHUNK", 10):
        first.create(manifest("ada"))
        commit(first, 1, b"x" * 50)
        changes = {
            "compact": lambda: first.compact("ada", 1, b"s" * 50),
            "fork": lambda: first.fork("ada", "bob", created=1.0),
        }
        with mock.patch.object(blobs, part, sleepy), pytest.raises((TenantNotFound, VersionConflict)):
            changes[does]()
    assert calls == 5
    with redis_server.client() as client:
        assert not [key for key in client.keys("*") if tenant_id(target).encode() in key and b"blob" in key]


@pytest.mark.parametrize("does", ["compact", "fork"])
def test_what_a_server_wrote_that_slept_and_was_killed_is_erased(
    opened: Any, redis_server: RedisServer, does: str
) -> None:
    store = opened()
    store.create(manifest())
    commit(store, 1, b"x" * 50)
    blobs = store._redis_blobs
    # of a blob that somebody has removed meanwhile, the last chunk
    if does == "compact":
        blobs._put_chunk("ada", "0000000001-0123456789abcdef.snapshot", 3, b"chunk", 50)
    else:
        source = blobs._chunk("ada", store.load("ada").blocks[0].blob.name, 0)
        ours = BlobRef("0000000001-0123456789abcdef.block", 50, "")
        assert blobs._share_chunk(
            source, blobs._chunk("ada", ours.name, 0), store._keys.of("ada", "blobs"), ours
        )
    assert len(blobs.held("ada")) == 2
    with mock.patch.object(redis_blobs, "CHUNK", 10):
        assert store.erase("ada").blobs == 2
    with redis_server.client() as client:
        assert not [key for key in client.keys("*") if b"blob" in key]


def test_blobs_of_several_chunks(opened: Any, redis_server: RedisServer) -> None:
    with mock.patch.object(redis_blobs, "CHUNK", 10):
        store = opened()
        store.create(manifest())
        sizes = (0, 1, 9, 10, 11, 20, 95)
        for version, size in enumerate(sizes, start=1):
            data = bytes(range(size))
            ref = commit(store, version, data).blocks[-1].blob
            assert store.read("ada", ref) == data
            for piece in (1, 7, 10, 100):
                assert whole(store, ref, piece=piece) == data
        fork = store.fork("ada", "bob", created=1.0)
        assert [store.read("bob", block.blob) for block in fork.blocks] == [bytes(range(s)) for s in sizes]
        store.erase("ada")
        assert store.read("bob", fork.blocks[-1].blob) == bytes(range(95))
        store.erase("bob")
    with redis_server.client() as client:
        assert {key.decode().split(":")[-1] for key in client.keys("*")} <= {"format", "tenants", "fence"}


def damage(server: RedisServer, store: RedisStore, what: str, change: Any) -> None:
    with server.client() as client:
        (key,) = [k for k in client.keys("*") if k.decode().startswith(store._keys.of("ada", what))]
        data = client.get(key)
        client.delete(key)
        if change is not None:
            client.set(key, change(data))


@pytest.mark.parametrize("what", ["manifest", "blob:"])
@pytest.mark.parametrize(
    "change",
    [None, lambda data: data[:-1], lambda data: bytes([data[0] ^ 1]) + data[1:], lambda data: b""],
    ids=["missing", "short", "altered", "empty"],
)
def test_damage_is_the_one_tenants_own(
    opened: Any, redis_server: RedisServer, what: str, change: Any
) -> None:
    store = opened()
    for tenant in ("ada", "bob"):
        store.create(manifest(tenant))
        commit(store, 1, b"some block", tenant)
    store.close()
    damage(redis_server, store, what, change)
    again = opened()

    def read(tenant: str) -> bytes:
        data: bytes = again.read(tenant, again.load(tenant).blocks[0].blob)
        return data

    with pytest.raises(TenantQuarantined):
        read("ada")
    with pytest.raises(TenantQuarantined):
        whole(again, again.load("ada").blocks[0].blob)
    assert read("bob") == b"some block"
    assert list(again.tenants()) == ["ada", "bob"]
    assert again.erase("ada") is not None
    assert list(again.tenants()) == ["bob"]
    again.create(manifest())
    assert commit(again, 1).version == 1


def test_what_a_crash_left_is_swept_at_the_next_claim(opened: Any, redis_server: RedisServer) -> None:
    store = opened()
    store.create(manifest())
    commit(store, 1)
    orphan = store._blobs.new_name(2, "block")
    store._blobs.put("ada", orphan, b"never named")
    store.close()
    again = opened()
    again.claim("ada")
    with redis_server.client() as client:
        assert not [key for key in client.keys("*") if orphan.encode() in key]
    assert again.read("ada", again.load("ada").blocks[0].blob) == b"block"


@pytest.mark.parametrize("cut", ["before", "after"])
def test_what_was_left_of_a_tenant_never_made_is_swept_at_the_next_start(
    opened: Any, redis_server: RedisServer, cut: str
) -> None:
    store = opened()
    begin = store._redis_manifests.begin

    def broken(new: Manifest) -> Manifest:
        if cut == "after":
            begin(new)
        raise StoreFailed("cut")

    with mock.patch.object(store._redis_manifests, "begin", broken), pytest.raises(StoreFailed):
        store.create(manifest(), b"a pool")
    with redis_server.client() as client:
        assert [key for key in client.keys("*") if b"blob:" in key]
        other = opened()
        # whoever is at work for it is left alone
        assert [key for key in client.keys("*") if b"blob:" in key]
        assert client.exists(store._keys.making)
        store.close()
        other = opened()
        left = [key for key in client.keys("*") if tenant_id("ada").encode() in key and b"lease" not in key]
        assert bool(left) == (cut == "after")
        assert not client.exists(store._keys.making)
    assert (other.load("ada") is not None) == (cut == "after")


def test_an_erasure_that_was_cut_short_is_ended_at_the_next_start(
    opened: Any, redis_server: RedisServer
) -> None:
    store = opened()
    store.create(manifest())
    commit(store, 1)
    with (
        mock.patch.object(store._redis_blobs, "remove", side_effect=StoreFailed("cut")),
        pytest.raises(StoreFailed, match="out of reach"),
    ):
        store.erase("ada")
    assert store.load("ada") is None
    assert list(store.tenants()) == []
    store.close()
    again = opened()
    assert again.load("ada") is None
    with redis_server.client() as client:
        assert not [key for key in client.keys("*") if tenant_id("ada").encode() in key]


def test_a_full_server_refuses_updates_and_goes_on_reading(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, maxmemory="8mb")
    try:
        store = open_store(server.url)
        store.create(manifest())
        version = 0
        with pytest.raises(StoreFull) as full:  # noqa: PT012
            while version < 1000:
                commit(store, version + 1, bytes(200_000))
                version += 1
        assert full.value.retry_after
        assert version > 3
        found = store.load("ada")
        assert found is not None
        assert found.version == version
        assert all(store.read("ada", block.blob) == bytes(200_000) for block in found.blocks)
        store.close()
        with server.client() as client:
            # so full that not a byte may be written
            client.config_set("maxmemory", "1mb")
        # another server is not kept from reading and erasing, which makes room
        store = open_store(server.url)
        again = store.claim("ada")
        assert again == found
        assert store.read("ada", found.blocks[0].blob) == bytes(200_000)
        with pytest.raises(StoreFull):
            commit(store, version + 1, bytes(200_000))
        assert store.erase("ada") is not None
        with server.client() as client:
            client.config_set("maxmemory", "8mb")
        store.create(manifest())
        commit(store, 1, bytes(200_000))
        store.close()
    finally:
        server.stop()


def test_a_restart_of_the_server_is_got_over(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    try:
        store = open_store(f"{server.url}?timeout=2")
        store.create(manifest())
        for version in range(1, 6):
            commit(store, version)
            server.kill()
            with pytest.raises(StoreFailed):
                commit(store, version + 1)
            server.start()
            found = store.claim("ada")
            assert found is not None
            assert found.version == version
            assert store.read("ada", found.blocks[-1].blob) == b"block"
        store.close()
    finally:
        server.stop()
