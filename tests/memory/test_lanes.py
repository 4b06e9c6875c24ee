"""Copies beside the steps, on streams that run in any order which their waits allow."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor

from app.memory.lanes import CudaStreams, HostLanes, Lanes, StreamLanes

LAYERS = 6


@dataclass(eq=False)
class Event:
    reached: bool = False


@dataclass(eq=False)
class Stream:
    """Work in order; an event in it holds up what is behind it."""

    work: deque[Callable[[], object] | Event] = field(default_factory=deque)


class FakeStreams:
    """Runs its streams only while somebody waits for an event, one piece of work of a random stream at a time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.steps = Stream()
        self.streams = [self.steps]
        self.now = self.steps
        self.pinned_buffers: list[Tensor] = []

    def current(self) -> Stream:
        return self.now

    def new(self) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    def record(self, stream: Stream) -> Event:
        event = Event()
        stream.work.append(lambda: setattr(event, "reached", True))
        return event

    def wait(self, stream: Stream, mark: Event) -> None:
        stream.work.append(mark)

    def _runnable(self) -> list[Stream]:
        for stream in self.streams:
            while stream.work and isinstance(stream.work[0], Event) and stream.work[0].reached:
                stream.work.popleft()
        return [s for s in self.streams if s.work and not isinstance(s.work[0], Event)]

    def finish(self, mark: Event) -> None:
        while not mark.reached:
            runnable = self._runnable()
            assert runnable, "waits for what never comes"
            work = self.random.choice(runnable).work.popleft()
            assert not isinstance(work, Event)
            work()

    @contextmanager
    def using(self, stream: Stream) -> Generator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.now.work.append(lambda: target.copy_(source))

    def pinned(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        self.pinned_buffers.append(torch.full(shape, torch.nan, dtype=dtype))
        return self.pinned_buffers[-1]

    def pinned_bytes(self, size: int) -> int:
        return 3 * size

    def room(self, rows: Tensor) -> Tensor:
        return torch.full_like(rows, torch.nan)


def lanes_and_streams(seed: int) -> tuple[StreamLanes, FakeStreams]:
    streams = FakeStreams(seed)
    return StreamLanes(streams, torch.float32), streams


def swap(lanes: Lanes, *, ways: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A slot of -1 leaves by ``ways[0]`` copies while 0, 1, … come by ``ways[1]``: (kept, slot)."""
    slot, coming = torch.full((LAYERS, 3), -1.0), torch.arange(LAYERS)[:, None] + torch.zeros(LAYERS, 3)
    kept = torch.zeros_like(slot)
    out = [(kept[i], slot[i]) for i in range(ways[0])]
    lanes.exchange(lanes.mark(), out, [(slot[i], coming[i]) for i in range(ways[1])])
    return kept, slot


@pytest.mark.parametrize("ways", [(LAYERS, LAYERS), (LAYERS, 0), (0, LAYERS), (LAYERS, LAYERS - 1), (2, 5)])
def test_what_comes_never_overwrites_what_has_not_left(ways: tuple[int, int]) -> None:
    kinds: list[Lanes] = [HostLanes(torch.float32), *(lanes_and_streams(seed)[0] for seed in range(40))]
    for lanes in kinds:
        kept, slot = swap(lanes, ways=ways)
        assert (kept[: ways[0]] == -1).all()
        assert torch.equal(slot[: ways[1], 0], torch.arange(float(ways[1])))


def test_a_slot_is_written_only_after_the_steps_that_used_it_and_before_none_later() -> None:
    for seed in range(40):
        lanes, streams = lanes_and_streams(seed)
        slot, seen = torch.zeros(LAYERS), []
        for _ in range(3):
            streams.steps.work.append(lambda: seen.append(slot.clone()))  # noqa: B023
        mark = lanes.mark()
        # a step that never ends: no swap may wait for what was issued after the mark
        streams.steps.work.append(Event())
        lanes.exchange(mark, [], [(slot[i], torch.tensor(1.0)) for i in range(LAYERS)])
        assert slot.sum() == LAYERS
        assert [float(s.sum()) for s in seen] == [0, 0, 0]


def test_what_runs_apart_runs_behind_the_mark_and_beside_later_steps() -> None:
    for seed in range(40):
        lanes, streams = lanes_and_streams(seed)
        slot, seen = torch.zeros(LAYERS), []
        streams.steps.work.append(lambda: seen.append(slot.clone()))  # noqa: B023
        mark = lanes.mark()
        streams.steps.work.append(Event())
        with lanes.apart(mark):
            streams.now.work.append(lambda: slot.fill_(2))  # noqa: B023
        assert slot.sum() == 2 * LAYERS
        assert [float(s.sum()) for s in seen] == [0]


def test_layers_take_turns_in_two_buffers() -> None:
    for seed in range(40):
        lanes, streams = lanes_and_streams(seed)
        for _ in range(2):
            with lanes.apart(lanes.mark()):
                brought = [lanes.bring(torch.full((4, 2), float(i))) for i in range(LAYERS)]
            assert [float(t[0, 0]) for t in brought] == list(range(LAYERS))
        assert len(streams.pinned_buffers) == 2


@pytest.mark.parametrize("broken", [False, True])
def test_nothing_of_what_was_brought_stays_in_the_buffers(broken: bool) -> None:
    for seed in range(40):
        lanes, streams = lanes_and_streams(seed)
        brought: list[Tensor] = []
        with suppress(RuntimeError), lanes.apart(lanes.mark()):
            brought += [lanes.bring(torch.full((4, 2), 1.0 + i)) for i in range(LAYERS)]
            if broken:
                raise RuntimeError("broken")
        assert [float(t[3, 1]) for t in brought] == [1.0 + i for i in range(LAYERS)]
        assert len(streams.pinned_buffers) == 2
        assert not any(buffer.any() for buffer in streams.pinned_buffers)


def test_threads_have_buffers_only_while_they_bring() -> None:
    lanes, streams = lanes_and_streams(0)
    found: list[float] = []

    def bring(number: int, inside: Callable[[], object] = lambda: None) -> None:
        with lanes.apart(lanes.mark()):
            first = lanes.bring(torch.full((2,), float(number)))
            inside()
            second = lanes.bring(torch.full((2,), float(number)))
        found.extend(float(t[0]) for t in (first, second))

    def elsewhere(work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    for number in range(6):
        elsewhere(partial(bring, number))
    assert len(streams.pinned_buffers) == 2, "a set for each thread"
    # two at once have their own, also where one of them has had some before
    bring(6)
    bring(7, lambda: elsewhere(lambda: bring(8)))
    assert len(streams.pinned_buffers) == 4
    assert found == [float(n) for n in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 8, 8, 7, 7)]


def test_pinned_memory_costs_a_power_of_two() -> None:
    streams = CudaStreams(torch.device("cpu"))
    sizes = {0: 0, 1: 1, 2: 2, 3: 4, 4096: 4096, 4097: 8192, 2**30 - 1: 2**30, 2**30: 2**30, 2**30 + 1: 2**31}
    assert {size: streams.pinned_bytes(size) for size in sizes} == sizes
    assert lanes_and_streams(0)[0].host_bytes(5) == 15
    assert HostLanes(torch.float32).host_bytes(5) == 5


def test_an_error_ends_the_copies_before_it_is_told() -> None:
    lanes, streams = lanes_and_streams(1)
    slot = torch.zeros(2)

    def failing() -> Generator[tuple[Tensor, Tensor]]:
        yield slot[0], torch.tensor(1.0)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        lanes.exchange(lanes.mark(), [], failing())
    assert slot[0] == 1

    def broken() -> None:
        with lanes.apart(lanes.mark()):
            streams.now.work.append(lambda: slot.fill_(3))
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        broken()
    assert slot[1] == 3
