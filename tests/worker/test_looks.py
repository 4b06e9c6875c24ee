"""Looks: a few at a time, tenants in turns, and never in the way of what the steps wait for."""

from __future__ import annotations

import structlog

from app import logs
from app.messages import Erased, EraseTenant, GetHistory, GetMemory, Reply
from app.worker.looks import MOST, Looks
from tests.harness import Harness, Inline, load_backbone


def test_tenants_take_turns_a_few_at_a_time() -> None:
    inline, order = Inline(), list[str]()
    looks = Looks(inline.submit)
    for tenant in ["ada"] * 6 + ["bob"] * 2 + ["eve"]:
        looks.submit(tenant, lambda tenant=tenant: order.append(tenant), lambda result, error: None)
    assert len(inline.waiting) == MOST
    while inline.waiting:
        assert len(inline.waiting) <= MOST
        # the one that began first ends first
        work, done = inline.waiting.pop(0)
        done(work(), None)
    assert order == ["ada", "ada", "ada", "bob", "eve", "ada", "bob", "ada", "ada"]


def test_each_is_about_its_own_request() -> None:
    inline, about = Inline(), list[object]()
    looks = Looks(lambda work, done: (note(), inline.submit(work, done))[1])

    def note() -> None:
        about.append(structlog.contextvars.get_contextvars().get("job"))

    for number in range(MOST + 2):
        with logs.about(f"look {number}"):
            looks.submit("ada", lambda: None, lambda result, error: None)
    while inline.waiting:
        inline.drain()
    assert about == [f"look {number}" for number in range(MOST + 2)]


def test_a_tenant_that_looks_a_lot_holds_nobody_up() -> None:
    harness = Harness(load_backbone("plain")[0])
    for tenant in ("ada", "bob"):
        harness.update(tenant, list(range(20, 40)))
    for number in range(10):
        harness.send(GetHistory(f"look {number}", "ada"))
        harness.send(GetMemory(f"view {number}", "ada"))
    assert len(harness.inline.waiting) == MOST
    harness.send(GetHistory("other", "bob"))
    update = harness.begin_update("bob", list(range(40, 60)))
    while not harness.of("other"):
        harness.step()
    assert not harness.of("look 5")
    harness.send(EraseTenant("erase", "ada"))
    harness.run()
    assert all(harness.of(f"look {number}") and harness.of(f"view {number}") for number in range(10))
    assert harness.of(update)
    erased = harness.final("erase")
    assert isinstance(erased, Reply)
    assert isinstance(erased.body, Erased)
