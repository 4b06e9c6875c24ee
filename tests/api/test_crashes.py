"""What becomes of requests whose worker ends: sent again where nobody would notice, but not a third time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from app import messages as m
from app.api import worker as module
from app.api.suspects import SERVER_KEY, Suspects
from app.api.worker import WorkerClient
from app.errors import RequestCrashed
from tests.api.conftest import Service, until
from tests.api.fake_worker import model_info
from tests.api.test_bad_input import SECRET, check_error
from tests.api.test_update import TEXT, events

pytestmark = pytest.mark.anyio

REASON = "the worker ended with exit code 9"


@dataclass
class Lives:
    """A service whose worker answers nobody in ``silent`` until its next life, or for ever."""

    service: Service
    path: str
    silent: set[str] = field(default_factory=set)
    _transport: Callable[[bytes], None] | None = None

    def __post_init__(self) -> None:
        fake = self.service.fake
        answer = fake.handle

        def handle(request: m.Request) -> list[m.Answer]:
            if getattr(request, "tenant", "") in self.silent:
                fake.seen.append(request)
                return []
            return answer(request)

        fake.handle = handle  # type: ignore[method-assign]
        self._transport = self.client._transport

    @property
    def client(self) -> WorkerClient:
        return self.service.client

    def end(self) -> None:
        self.client.detach(REASON)

    async def begin(self) -> None:
        assert self._transport is not None
        self.client.attach(self._transport, 0.0)
        self.client.received([m.Ready(model_info(self.path), pid=1)], 0.0)
        await self.client.settled.wait()

    def sent(self, tenant: str) -> int:
        asked = m.Generate | m.Score | m.Update | m.GetTenant
        return sum(isinstance(r, asked) and r.tenant == tenant for r in self.service.seen)

    def post(self, path: str, **body: object) -> asyncio.Task[httpx.Response]:
        return asyncio.create_task(self.service.post(path, body))

    def generate(self, tenant: str, **more: object) -> asyncio.Task[httpx.Response]:
        return self.post("/generate", tenant=tenant, prompt="Lisbon", max_tokens=3, **more)


@pytest.fixture
async def lives(service: Service, model_dir: Path) -> Lives:
    return Lives(service, str(model_dir))


async def test_what_has_no_output_yet_is_sent_again(lives: Lives) -> None:
    lives.silent = {"ann", "bob", "eve"}
    calls = [
        lives.generate("ann"),
        lives.generate("bob", stream=True),
        lives.post("/score", tenant="eve", prompt="a", continuation="b"),
    ]
    await until(lambda: all(lives.sent(name) == 1 for name in lives.silent))
    names, lives.silent = lives.silent, set()
    lives.end()
    await lives.begin()
    answers = await asyncio.gather(*calls)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert all(lives.sent(name) == 2 for name in names)


async def test_what_has_output_is_not(lives: Lives) -> None:
    call = lives.generate("hold", stream=True)
    await lives.service.until_seen(m.Generate)
    await until(lambda: bool(lives.service.fake.held))
    await asyncio.sleep(0)
    lives.end()
    await lives.begin()
    name, data = events((await call).text)[-1]
    assert (name, data["error"]["code"]) == ("error", "worker_unavailable")
    assert lives.sent("hold") == 1


async def test_an_update_has_a_key_of_the_servers_own(lives: Lives) -> None:
    """The first attempt was committed before the worker ended; the second learns it by the key, the client nothing."""
    fake = lives.service.fake
    answer, told = fake.handle, list[m.Answer]()

    def commit_and_end(request: m.Request) -> list[m.Answer]:
        told.extend(answer(request))
        return []

    fake.handle = commit_and_end  # type: ignore[method-assign]
    call = lives.post("/update", tenant="ann", text=TEXT)
    await until(lambda: bool(told))
    fake.handle = answer  # type: ignore[method-assign]
    lives.end()
    await lives.begin()
    updated = (await call).json()
    assert (updated["memory_version"], updated["replayed"]) == (fake.memories["ann"], False)
    first, second = [r for r in lives.service.seen if isinstance(r, m.Update)]
    assert first == second
    assert (first.idempotency_key or "").startswith(SERVER_KEY)
    taken = await lives.service.post(
        "/update", {"tenant": "ann", "text": TEXT, "idempotency_key": f"{SERVER_KEY}1"}
    )
    check_error(taken, 422, "invalid_request", "idempotency_key")


async def test_a_request_that_ends_workers_is_tried_twice(lives: Lives) -> None:
    """Alone the second time, so that only it is to blame; and refused when it comes again."""
    poison, others = "poison", ["ann", "bob", "eve"]
    lives.silent = {poison, *others}
    calls = {name: lives.generate(name) for name in ["ann", poison, "bob", "eve"]}
    await until(lambda: all(lives.sent(name) == 1 for name in calls))
    order = [r.tenant for r in lives.service.seen if isinstance(r, m.Generate)]
    before = order.index(poison)
    lives.end()
    lives.silent = {poison}
    await lives.begin()
    await until(lambda: lives.sent(poison) == 2)
    times = [2] * (before + 1) + [1] * (len(order) - before - 1)
    assert [lives.sent(name) for name in order] == times, "those behind it wait until it is done"
    lives.end()
    await lives.begin()
    failed = await calls[poison]
    check_error(failed, 500, "request_crashed")
    assert "Lisbon" not in failed.text
    assert [(await calls[name]).status_code for name in others] == [200] * 3

    again = await lives.generate(poison)
    check_error(again, 500, "request_crashed")
    assert lives.sent(poison) == 2
    other = await lives.post("/generate", tenant="ann", prompt="Lisbon", max_tokens=3)
    assert other.status_code == 200


async def test_nothing_passes_what_its_tenant_asked_for_before_the_worker_ended(lives: Lives) -> None:
    slow, other = "slow", {"tenant": "ann", "prompt": "Lisbon", "max_tokens": 3}
    lives.silent = {slow, "ann"}
    calls = [lives.generate(slow)]
    await until(lambda: lives.sent(slow) == 1)
    calls.append(lives.post("/update", tenant="ann", text=TEXT, idempotency_key="old"))
    await until(lambda: lives.sent("ann") == 1)
    lives.end()
    lives.silent = {slow}
    # the new worker has had the slow one, whose answer is waited for before the next is sent
    await lives.begin()
    await until(lambda: lives.sent(slow) == 2)
    calls.append(lives.post("/update", tenant="ann", text=TEXT, idempotency_key="new"))
    calls.append(lives.post("/generate", **other))
    # others do not wait
    assert (await lives.generate("bob")).status_code == 200
    assert lives.sent("ann") == 1
    lives.silent = set()
    id = next(
        id for id, stream in lives.client._open.items() if getattr(stream.request, "tenant", "") == slow
    )
    lives.client.received([m.Failed(id, "worker_unavailable", "gone")], 0.0)
    for call in calls[1:]:
        assert (await call).status_code == 200
    asked = [r for r in lives.service.seen if getattr(r, "tenant", "") == "ann"]
    assert [getattr(r, "idempotency_key", None) for r in asked] == ["old", "old", "new", None]


async def test_looking_is_never_to_blame(lives: Lives) -> None:
    await lives.service.post("/tenants", {"id": "ann"})
    for _ in range(2):
        lives.silent = {"ann"}
        seen = lives.sent("ann")
        call = asyncio.create_task(lives.service.http.get("/tenants/ann"))
        await until(lambda seen=seen: lives.sent("ann") > seen)  # type: ignore[misc]
        lives.silent = set()
        lives.end()
        await lives.begin()
        assert (await call).status_code == 200


async def test_no_worker_comes(lives: Lives, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESEND_SECONDS", 0.01)
    lives.silent = {"ann", "bob"}
    calls = [
        lives.generate("ann"),
        lives.post("/update", tenant="bob", text=TEXT),
        lives.post("/update", tenant="carl", text=TEXT, idempotency_key="mine"),
    ]
    lives.silent |= {"carl"}
    await until(lambda: lives.sent("ann") == lives.sent("bob") == lives.sent("carl") == 1)
    lives.end()
    generated, updated, marked = await asyncio.gather(*calls)
    for answer in (generated, updated, marked):
        check_error(answer, 503, "worker_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
    # who gave no key has none to try again with
    told = [answer.json()["error"]["message"] for answer in (updated, marked)]
    assert ["with the same idempotency key is safe" in message for message in told] == [False, True]
    assert all("whether the update was taken in is not known" in message for message in told)


@pytest.mark.parametrize("then", ["drain", "die"])
async def test_nothing_waits_for_a_worker_that_will_not_come(lives: Lives, then: str) -> None:
    lives.silent = {"ann"}
    call = lives.generate("ann")
    await until(lambda: lives.sent("ann") == 1)
    if then == "drain":
        lives.client.drain(5.0)
        lives.end()
    else:
        lives.end()
        # the next one ended before it was ready
        lives.end()
    async with asyncio.timeout(module.RESEND_SECONDS / 2):
        check_error(await call, 503, "worker_unavailable")


async def test_who_has_gone_is_not_sent_again(lives: Lives) -> None:
    lives.silent = {"ann"}
    call = lives.generate("ann")
    await until(lambda: lives.sent("ann") == 1)
    lives.end()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await lives.begin()
    assert (await lives.generate("bob")).status_code == 200
    assert lives.sent("ann") == 1


def generate(tenant: str, id: str, deadline: float) -> m.Generate:
    return m.Generate(id, tenant, [5, 6], m.Sampling(3), deadline)


def test_suspects_are_known_again_and_few() -> None:
    now = 0.0
    suspects = Suspects(most=3, clock=lambda: now)
    one, same = generate("ann", "1", 1.0), generate("ann", "2", 2.0)
    assert suspects.blame(one, 1) == suspects.blame(same, 1) == 1
    suspects.check(same)
    assert suspects.blame(same, 2) == 2
    with pytest.raises(RequestCrashed):
        suspects.check(one)
    suspects.check(generate("bob", "1", 1.0))
    keys = [m.Update("", "ann", [m.Context([5])], f"{SERVER_KEY}{n}") for n in range(2)]
    assert [suspects.blame(update, end) for end, update in enumerate(keys, 1)] == [1, 2]
    for number in range(3):
        suspects.blame(generate(str(number), "1", 1.0), 3)
    assert len(suspects) == 3
    suspects.check(one)
    now = 601.0
    suspects.check(one)
    assert len(suspects) == 0


def test_suspects_keep_no_text() -> None:
    suspects = Suspects()
    suspects.blame(m.Update("", SECRET, [m.Context([5], SECRET)], SECRET), 1)
    assert SECRET not in str(suspects.__dict__)
