"""What the loop's thread leaves to others: a device has nothing to do while it draws, counts ranks or copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from app.memory.residency import Residency
from app.messages import Context, Reply, Update, Updated
from app.worker import rebuilds, updates
from tests.harness import Done, Harness, Inline, load_backbone
from tests.worker.test_memories import pool
from tests.worker.test_rebuilds import message


class Beside(Inline):
    """Knows whether the work that is being done is a background thread's."""

    inside = False

    def submit(self, work: Callable[[], object], done: Done) -> None:
        def marked() -> object:
            with self._marked():
                return work()

        super().submit(marked, done)

    @contextmanager
    def _marked(self) -> Iterator[None]:
        self.inside = True
        try:
            yield
        finally:
            self.inside = False


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Beside:
    inline = Beside()
    monkeypatch.setattr("tests.harness.Inline", lambda: inline)
    return inline


@pytest.fixture
def calls(beside: Beside, monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, bool]]:
    """How often each was called, and whether beside the loop."""
    seen: Counter[tuple[str, bool]] = Counter()

    def watch(target: object, name: str) -> None:
        whole = getattr(target, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            seen[name, beside.inside] += 1
            return whole(*arguments, **named)

        monkeypatch.setattr(target, name, watched)

    for module in (updates, rebuilds):
        watch(module, "draw")
    watch(updates, "change")
    watch(Residency, "fetch")
    return seen


def told(harness: Harness, *contexts: list[int]) -> None:
    request = harness.id()
    spelled = [Context(c, " ".join(map(str, c)) + "\n") for c in contexts]
    harness.send(Update(request, "ada", spelled))
    harness.run()
    assert isinstance(harness.final(request), Updated)


def test_updates_and_rebuilds_are_worked_out_beside_the_loop(calls: Counter[tuple[str, bool]]) -> None:
    harness = Harness(load_backbone("two-adapters")[0])
    told(harness, list(range(20, 40)), list(range(50, 70)))
    assert calls == {("draw", True): 2, ("change", True): 2, ("fetch", True): 2}
    before = pool(harness, "ada")
    calls.clear()
    request = message(harness, "ada")
    harness.send(request)
    harness.run()
    assert isinstance(harness.final(request.id), Reply)
    assert calls == {("draw", True): 2, ("fetch", True): 2}
    after = pool(harness, "ada")
    assert torch.equal(after.hidden, before.hidden)
    assert torch.equal(after.born, before.born)


def test_what_fills_an_empty_memory_draws_nothing(calls: Counter[tuple[str, bool]]) -> None:
    harness = Harness(load_backbone("uninitialized")[0])
    told(harness, list(range(20, 60)))
    assert calls == {("fetch", True): 1}
