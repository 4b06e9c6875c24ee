"""Steps captured in CUDA graphs: a step of a large model is hundreds of launches, and Python is slower.

Captured are steps in which sequences decode, and those with nothing but the end of one short prompt: a first token
on a server that is not busy. A graph reads everything from tensors that stay where they are; a step rewrites those and
replays. There is one graph for each size of batch, rounded up, and each shape of work list. Rows that round a batch up
read nothing, and write their keys to a cache row that nobody reads.
"""

from __future__ import annotations

import contextlib
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
# longer prompts keep a device busy for as long as Python takes
_LEAST_PROMPT, _MOST_PROMPT = 16, 128

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Turns work, which returns a tensor, into its replay, which returns that tensor, filled anew."""


def cuda_capture() -> Capture:
    """Captures on the current device; all graphs share one memory pool, for they never run at once.

    They share a stream as well: libraries keep a workspace for each stream that they have been used on.
    """
    shared = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    broken: list[torch.cuda.CUDAGraph] = []

    def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        nonlocal shared
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
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=shared, stream=stream, capture_error_mode="thread_local"),
            ):
                out = work()
        except BaseException:
            _end_capture(shared)
            # before 2.12 torch's allocator of pinned memory goes on asking this graph whether it captures, and
            # takes its pool for busy
            broken.append(graph)
            shared = torch.cuda.graph_pool_handle()
            raise

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return capture


def _end_capture(pool: tuple[int, int]) -> None:
    """Tells torch's allocator that a capture is over which an error has ended: as long as it thinks of one it frees
    nothing that several streams have used, and gives nothing back to the device."""
    with contextlib.suppress(RuntimeError):
        # it raises if it knew
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


@dataclass(frozen=True)
class _Static:
    """What graphs of ``size`` rows read: tokens, positions, write rows and logit rows, [4, size] int64."""

    host: Tensor
    device: Tensor


@dataclass(frozen=True)
class _Key:
    """What one graph is good for: so many rows of decoding sequences, or of a prompt, read in tiles of so many."""

    prompt: bool
    rows: int
    tile_rows: int


class StepGraphs:
    """Replays steps of a backbone whose operations are kernels.

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
        self.most_prompt = min(_MOST_PROMPT, self._operations.sizes.rows)
        self._capture = capture
        self._static: dict[int, _Static] = {}
        # one for all graphs, which never run at once: an output of its own would be kept for each of them
        vocab = backbone.config.vocab_size
        self._logits = torch.empty(most, vocab, dtype=backbone.dtype, device=backbone.device)
        # with the batch that was captured: a graph knows addresses only, and what lies there must stay
        self._replays: dict[_Key, tuple[Callable[[], Tensor], Batch]] = {}
        self._broken, self._failed = False, 0

    def decode(
        self, readings: list[Reading], tokens: list[int], positions: list[int], write_rows: list[int]
    ) -> Tensor | None:
        """Logits [rows, vocab] of one decode step, good until the next; None if it cannot be replayed.

        The step before must have been waited for: what it was given is overwritten.
        """
        rows = len(tokens)
        if rows > self._most:
            return None
        key = _Key(False, self.rounded(rows), self._operations.list_key(readings))
        wanted = list(range(key.rows))
        logits = self._replay(key, readings, rows, [tokens, positions, write_rows], wanted)
        return None if logits is None else logits[:rows]

    def prompt(
        self, reading: Reading, tokens: list[int], positions: list[int], write_rows: list[int]
    ) -> Tensor | None:
        """Logits [1, vocab] of the last of a prompt's ``tokens``; otherwise as ``decode``."""
        rows = len(tokens)
        if rows > self.most_prompt:
            return None
        size = min(max(_LEAST_PROMPT, 1 << (rows - 1).bit_length()), self.most_prompt)
        key = _Key(True, size, self._operations.prompt_key)
        return self._replay(key, [reading], 0, [tokens, positions, write_rows], [rows - 1])

    def _replay(
        self, key: _Key, readings: list[Reading], decode: int, given: list[list[int]], wanted: list[int]
    ) -> Tensor | None:
        """Logits [wanted, vocab]. ``given`` are tokens, positions and write rows of fewer rows than the graph has."""
        if self._broken and key not in self._replays:
            return None
        static = self._static_of(key.rows)
        missing = key.rows - len(given[0])
        padded = [row + [fill] * missing for row, fill in zip(given, (0, 0, self._dead_row), strict=True)]
        static.host.copy_(torch.tensor([*padded, wanted + [0] * (key.rows - len(wanted))]))
        static.device.copy_(static.host, non_blocking=True)
        reads = self._operations.prepare(readings, decode).padded(key.rows)
        if key not in self._replays:
            tokens, positions, write_rows, logit_rows = static.device
            batch = Batch(tokens, positions, write_rows, logit_rows[: len(wanted)], attend=reads)
            logits = self._logits[: len(wanted)]
            try:
                replay = self._capture(
                    lambda: logits.copy_(self._backbone.forward(batch, self._pools, self._cache))
                )
            except RuntimeError as error:
                # room for a graph may be there later; what else is in the way will be
                self._failed += 1
                self._broken = not isinstance(error, torch.OutOfMemoryError) or self._failed >= _MOST_FAILED
                log.warning(
                    "a step was not captured in a CUDA graph", reason=str(error), for_good=self._broken
                )
                return None
            self._replays[key] = replay, batch
        replay, _ = self._replays[key]
        return replay()

    def rounded(self, rows: int) -> int:
        """The batch size whose graph serves ``rows`` sequences: powers of two to 16, then multiples of 16."""
        if rows <= 16:
            return min(1 << (rows - 1).bit_length(), self._most)
        return min(-(-rows // 16) * 16, self._most)

    def _static_of(self, size: int) -> _Static:
        if size not in self._static:
            device = self._backbone.device
            host = torch.zeros(4, size, dtype=torch.int64, pin_memory=device.type == "cuda")
            self._static[size] = _Static(host, torch.zeros(4, size, dtype=torch.int64, device=device))
        return self._static[size]
