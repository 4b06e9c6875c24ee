"""Decode steps captured in CUDA graphs: a step of a large model is hundreds of launches, and Python is slower.

A graph reads everything from tensors that stay where they are; a step rewrites those and replays. There is one
graph for each size of batch, rounded up, and each shape of work list. Rows that round a batch up read nothing, and
write their keys to a cache row that nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import structlog
import torch
from torch import Tensor

from app.model.backbone import Backbone
from app.model.batch import Batch, ContextCache, Reading
from app.model.pools import Pools

if TYPE_CHECKING:
    from app.model.kernel_operations import KernelOperations

log = structlog.get_logger("worker")

_MOST_FAILED = 3

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Turns work, which returns a tensor, into its replay, which returns that tensor, filled anew."""


def cuda_capture() -> Capture:
    """Captures on the current device; all graphs share one memory pool, for they never run at once.

    They share a stream as well: libraries keep a workspace for each stream that they have been used on.
    """
    shared = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                # compiles kernels and makes libraries allocate, neither of which a capture may do
                work()
        finally:
            # of work that failed too the beginning runs, on what the next step reads and writes
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # a capture that fails may leave its own stream current; other threads go on loading pools beside it
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=shared, stream=stream, capture_error_mode="thread_local"),
        ):
            out = work()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return capture


@dataclass(frozen=True)
class _Static:
    """The tensors that graphs of ``size`` rows read: tokens, positions, write rows, [3, size] int64; and every row."""

    host: Tensor
    device: Tensor
    every: Tensor


class DecodeGraphs:
    """Replays decode steps of a backbone whose operations are kernels.

    ``dead_row`` is a row of ``cache`` that no sequence has; ``most`` is how many sequences run at once.
    """

    def __init__(
        self,
        backbone: Backbone,
        pools: Pools,
        cache: ContextCache,
        dead_row: int,
        most: int,
        capture: Capture,
    ) -> None:
        self._backbone = backbone
        self._operations = cast("KernelOperations", backbone.operations)
        self._pools, self._cache, self._dead_row = pools, cache, dead_row
        self._most = most
        self._capture = capture
        self._static: dict[int, _Static] = {}
        # one for all graphs, which never run at once: an output of its own would be kept for each of them
        vocab = backbone.config.vocab_size
        self._logits = torch.empty(most, vocab, dtype=backbone.dtype, device=backbone.device)
        # with the batch that was captured: a graph knows addresses only, and what lies there must stay
        self._replays: dict[tuple[int, int], tuple[Callable[[], Tensor], Batch]] = {}
        self._broken, self._failed = False, 0

    def step(
        self, readings: list[Reading], tokens: list[int], positions: list[int], write_rows: list[int]
    ) -> Tensor | None:
        """Logits [rows, vocab] of one decode step, good until the next; None if it cannot be replayed.

        The step before must have been waited for: what it was given is overwritten.
        """
        rows = len(tokens)
        if rows > self._most:
            return None
        size = self.rounded(rows)
        key = size, self._operations.list_key(readings)
        if self._broken and key not in self._replays:
            return None
        static = self._static_of(size)
        padding = [0] * (size - rows)
        static.host.copy_(
            torch.tensor(
                [tokens + padding, positions + padding, write_rows + [self._dead_row] * len(padding)]
            )
        )
        static.device.copy_(static.host, non_blocking=True)
        reads = self._operations.prepare(readings, rows).padded(size)
        if key not in self._replays:
            given, places, written = static.device
            batch = Batch(given, places, written, static.every, attend=reads)
            logits = self._logits[:size]
            try:
                replay = self._capture(
                    lambda: logits.copy_(self._backbone.forward(batch, self._pools, self._cache))
                )
            except RuntimeError as error:
                # room for a graph may be there later; what else is in the way will be
                self._failed += 1
                self._broken = not isinstance(error, torch.OutOfMemoryError) or self._failed >= _MOST_FAILED
                log.warning(
                    "a decode step was not captured in a CUDA graph", reason=str(error), for_good=self._broken
                )
                return None
            self._replays[key] = replay, batch
        replay, _ = self._replays[key]
        return replay()[:rows]

    def rounded(self, rows: int) -> int:
        """The batch size whose graph serves ``rows``: powers of two to 16, then multiples of 16."""
        if rows <= 16:
            return min(1 << (rows - 1).bit_length(), self._most)
        return min(-(-rows // 16) * 16, self._most)

    def _static_of(self, size: int) -> _Static:
        if size not in self._static:
            device = self._backbone.device
            host = torch.zeros(3, size, dtype=torch.int64, pin_memory=device.type == "cuda")
            self._static[size] = _Static(
                host,
                torch.zeros(3, size, dtype=torch.int64, device=device),
                torch.arange(size, device=device),
            )
        return self._static[size]
