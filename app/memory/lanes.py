"""How bytes move between host and device beside the steps: which stream waits for whom.

Steps are issued to the device in the loop's thread, on its current stream. Whoever frees memory that they have
used takes a ``mark`` there; whatever is to write over that memory runs behind the mark, on a stream of its own,
and has ended when the call returns, so that the loop may use the result at once. Nobody else needs to wait.
On a CPU all of this is a plain copy.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor

Mark = Any
"""A moment in what has been issued to the device: an event, or None on a CPU."""

Copies = Iterable[tuple[Tensor, Tensor]]
"""(target, source) pairs of equal shapes and dtypes, one behind the other."""


class Lanes(Protocol):
    """What moves beside the steps. ``mark`` is for the loop's thread, the rest for background threads."""

    def mark(self) -> Mark:
        """All that has been issued so far."""
        ...

    def host(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Host memory that the device copies from and to at full speed. Slow to get: keep it."""
        ...

    def host_bytes(self, size: int) -> int:
        """What ``host`` takes for a tensor of ``size`` bytes."""
        ...

    def exchange(self, after: Mark, out: Copies, back: Copies) -> None:
        """Copies ``out`` to the host and ``back`` to the device, both ways at once.

        The n-th of ``back`` is written only when the n-th of ``out`` has been read: a slot changes its tenant
        layer by layer. Everything has arrived on return.
        """
        ...

    def apart(self, after: Mark) -> AbstractContextManager[None]:
        """What is issued inside runs behind ``after`` and beside later steps; it has ended on leaving."""
        ...

    def bring(self, rows: Tensor) -> Tensor:
        """``rows`` [T, d] in host memory -> on the device, in the model's dtype. Inside ``apart``, which leaves nothing
        of it in host memory; later steps must not read it."""
        ...


class HostLanes:
    """The device is a CPU: steps and copies share its memory, and each call has ended when it returns."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def mark(self) -> Mark:
        return None

    def host(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def host_bytes(self, size: int) -> int:
        return size

    def exchange(self, after: Mark, out: Copies, back: Copies) -> None:
        for leaving, coming in zip_longest(out, back):
            for pair in (leaving, coming):
                if pair is not None:
                    pair[0].copy_(pair[1])

    @contextmanager
    def apart(self, after: Mark) -> Generator[None]:
        yield

    def bring(self, rows: Tensor) -> Tensor:
        return rows.to(self._dtype)


class Streams(Protocol):
    """A device's streams and events, as far as they are needed here."""

    def current(self) -> Any: ...

    def new(self) -> Any: ...

    def record(self, stream: Any) -> Mark: ...

    def wait(self, stream: Any, mark: Mark) -> None:
        """What is issued to ``stream`` from now on runs behind ``mark``."""
        ...

    def finish(self, mark: Mark) -> None:
        """Holds the calling thread until ``mark`` is reached."""
        ...

    def using(self, stream: Any) -> AbstractContextManager[Any]:
        """The calling thread issues to ``stream`` inside."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Issues a copy to the calling thread's stream."""
        ...

    def pinned(self, shape: torch.Size, dtype: torch.dtype) -> Tensor: ...

    def pinned_bytes(self, size: int) -> int:
        """What ``pinned`` takes for a tensor of ``size`` bytes."""
        ...

    def room(self, rows: Tensor) -> Tensor:
        """Device memory for ``rows``, in its dtype."""
        ...


class _Staging:
    """Two pinned buffers, which take turns."""

    def __init__(self) -> None:
        self.buffers: list[Tensor | None] = [None, None]
        self.busy: list[Mark] = [None, None]
        self.turn = 0

    def wipe(self) -> None:
        """Overwrites what was brought through them. Nothing may be on its way."""
        for buffer in self.buffers:
            if buffer is not None:
                buffer.zero_()
        self.busy = [None, None]


class _Local(threading.local):
    """A background thread's stream, and the staging that it has borrowed."""

    def __init__(self, new: Callable[[], Any]) -> None:
        self.stream = new()
        self.staging: _Staging | None = None


class StreamLanes:
    """The device has copy engines: pools leave on one stream and come on another, while a third computes."""

    def __init__(self, streams: Streams, dtype: torch.dtype) -> None:
        self._streams, self._dtype = streams, dtype
        self._out, self._back = streams.new(), streams.new()
        self._local = _Local(streams.new)
        # as many as have ever brought something at once, not one for each thread
        self._spare: deque[_Staging] = deque()

    def mark(self) -> Mark:
        return self._streams.record(self._streams.current())

    def host(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return self._streams.pinned(shape, dtype)

    def host_bytes(self, size: int) -> int:
        return self._streams.pinned_bytes(size)

    def exchange(self, after: Mark, out: Copies, back: Copies) -> None:
        streams = self._streams
        streams.wait(self._out, after)
        streams.wait(self._back, after)
        try:
            for leaving, coming in zip_longest(out, back):
                if leaving is not None:
                    with streams.using(self._out):
                        streams.copy(*leaving)
                    streams.wait(self._back, streams.record(self._out))
                if coming is not None:
                    with streams.using(self._back):
                        streams.copy(*coming)
        finally:
            # a copy that goes on after an error would write over what the memory is used for next
            for stream in (self._out, self._back):
                streams.finish(streams.record(stream))

    @contextmanager
    def apart(self, after: Mark) -> Generator[None]:
        streams, local = self._streams, self._local
        streams.wait(local.stream, after)
        try:
            with streams.using(local.stream):
                yield
        finally:
            streams.finish(streams.record(local.stream))
            staging, local.staging = local.staging, None
            if staging is not None:
                staging.wipe()
                self._spare.append(staging)

    def _staging(self) -> _Staging:
        """What the thread has borrowed until it leaves ``apart``."""
        local = self._local
        if local.staging is None:
            try:
                local.staging = self._spare.pop()
            except IndexError:
                local.staging = _Staging()
        return local.staging

    def bring(self, rows: Tensor) -> Tensor:
        staging = self._staging()
        turn = staging.turn
        staging.turn = 1 - turn
        if staging.busy[turn] is not None:
            self._streams.finish(staging.busy[turn])
        buffer = staging.buffers[turn]
        if buffer is None or buffer.shape != rows.shape:
            buffer = staging.buffers[turn] = self._streams.pinned(rows.shape, self._dtype)
        buffer.copy_(rows)
        target = self._streams.room(buffer)
        self._streams.copy(target, buffer)
        staging.busy[turn] = self._streams.record(self._local.stream)
        return target


class CudaStreams:
    """``Streams`` of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def new(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def record(self, stream: torch.cuda.Stream) -> Mark:
        return stream.record_event()

    def wait(self, stream: torch.cuda.Stream, mark: Mark) -> None:
        stream.wait_event(mark)

    def finish(self, mark: Mark) -> None:
        mark.synchronize()

    def using(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def pinned(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def pinned_bytes(self, size: int) -> int:
        # torch rounds each tensor up to the next power of two, to use its memory again for others
        return 1 << (size - 1).bit_length() if size else 0

    def room(self, rows: Tensor) -> Tensor:
        return torch.empty(rows.shape, dtype=rows.dtype, device=self._device)


def lanes_of(device: torch.device, dtype: torch.dtype) -> Lanes:
    """The lanes that suit the device."""
    return StreamLanes(CudaStreams(device), dtype) if device.type == "cuda" else HostLanes(dtype)
