"""Turns one step's work into a batch of tensors and runs it through the backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from app.memory.arena import Arena, Memory, Misplaced, View
from app.model.backbone import Backbone
from app.model.batch import Batch, ContextCache, Reading, SelfUpdate, UpdateSpan
from app.worker.graphs import Capture, StepGraphs
from app.worker.sequence import Sequence


@dataclass(frozen=True)
class ReadChunk:
    """``count`` tokens of a sequence's prompt, from ``start``."""

    sequence: Sequence
    start: int
    count: int


@dataclass(frozen=True)
class UpdateChunk:
    """``tokens`` of a self-update's context, from ``start``.

    ``memory`` is the one whose tail it reads, at ``version``; None where the tail is nobody's in the arena.
    """

    update: SelfUpdate
    start: int
    tokens: list[int]
    memory: Memory | None = None
    version: int = 0

    @property
    def rows(self) -> int:
        """Of the batch: the tokens, and at first the tail's."""
        return len(self.tokens) + (0 if self.start else self.update.tail_length)


class Stepped(NamedTuple):
    """What a step leaves, on the device: the sequences that have ``logits`` [sequences, vocab], as ordered, and those

    whose tokens are ``scored``, with these tokens and their rows of ``scores`` one behind the other.
    """

    sequences: list[Sequence]
    logits: Tensor
    scored: list[tuple[Sequence, Tensor]]
    scores: Tensor


class Runner:
    """Owns the context cache. Each call of ``step`` is one forward pass.

    ``capture``, on devices that have it, has steps replayed.
    """

    def __init__(
        self,
        backbone: Backbone,
        arena: Arena,
        cache_rows: int,
        max_running: int,
        capture: Capture | None = None,
    ) -> None:
        self.backbone = backbone
        self.arena = arena
        # one row more, which nobody reads
        self.cache: ContextCache = backbone.new_context_cache(cache_rows + 1)
        self._graphs: StepGraphs | None = None
        if capture is not None:
            self._graphs = StepGraphs(backbone, arena.pools, self.cache, cache_rows, max_running, capture)

    def step(self, decode: list[Sequence], reads: list[ReadChunk], updates: list[UpdateChunk]) -> Stepped:
        """Issues one step to the device: on a GPU nothing here waits for it. Updates advance in place.

        Raises Misplaced, having done nothing, if what one of them reads is another's: no answer is better than one
        from another tenant's memory. It ends the worker, whose slots can no longer be trusted.
        """
        # neighbours in the arena become neighbours in the batch
        decode = sorted(decode, key=lambda s: (s.view.hot is None, s.view.hot or 0))
        for sequence in [*decode, *(c.sequence for c in reads)]:
            self._check_read(sequence.memory, sequence.view)
        for update in updates:
            self._check_update(update)
        replayed = None if updates or self._graphs is None else self._replayed(decode, reads, self._graphs)
        if replayed is not None:
            return replayed
        batch, wanted, scored = self._batch(decode, reads, updates)
        logits = self.backbone.forward(batch, self.arena.pools, self.cache)
        for sequence in decode:
            sequence.computed += 1
        for chunk in reads:
            chunk.sequence.computed += chunk.count
        return Stepped(wanted, logits[: len(wanted)], scored, logits[len(wanted) :])

    def _check_read(self, memory: Memory, view: View) -> None:
        if not view.readers or not (view is memory.view or view in memory.older):
            raise Misplaced("a version is read that nobody holds")
        self.arena.check(memory, view)

    def _check_update(self, chunk: UpdateChunk) -> None:
        if chunk.memory is None:
            return
        self.arena.check(chunk.memory)
        if chunk.version != chunk.memory.version:
            raise Misplaced("an update goes on from a version that is not its memory's newest")

    def wait(self) -> None:
        """Until the device has done all steps that it was given; what loads beside them goes on."""
        if self.backbone.device.type == "cuda":
            torch.cuda.current_stream(self.backbone.device).synchronize()

    def _replayed(self, decode: list[Sequence], reads: list[ReadChunk], graphs: StepGraphs) -> Stepped | None:
        """The step as a graph's replay; None if no graph is for such a step."""
        if decode and not reads:
            return self._decoded(decode, graphs)
        if len(reads) == 1 and not decode:
            return self._prompted(reads[0], graphs)
        return None

    def _decoded(self, decode: list[Sequence], graphs: StepGraphs) -> Stepped | None:
        logits = graphs.decode(
            [self._reading(s, slice(row, row + 1), s.computed + 1) for row, s in enumerate(decode)],
            [s.tokens[s.computed] for s in decode],
            [s.first_position + s.computed for s in decode],
            [s.rows[s.bos + s.computed] for s in decode],
        )
        if logits is None:
            return None
        for sequence in decode:
            sequence.computed += 1
        return Stepped(decode, logits, [], logits[:0])

    def _prompted(self, chunk: ReadChunk, graphs: StepGraphs) -> Stepped | None:
        sequence, end = chunk.sequence, chunk.start + chunk.count
        if sequence.scored or end < len(sequence.tokens) or chunk.count > graphs.most_prompt:
            return None
        first = sequence.first_position + chunk.start
        logits = graphs.prompt(
            self._reading(sequence, slice(0, chunk.count), end),
            sequence.tokens[chunk.start : end],
            list(range(first, first + chunk.count)),
            sequence.rows[sequence.bos + chunk.start : sequence.bos + end],
        )
        if logits is None:
            return None
        sequence.computed += chunk.count
        return Stepped([sequence], logits, [], logits[:0])

    def _batch(
        self, decode: list[Sequence], reads: list[ReadChunk], updates: list[UpdateChunk]
    ) -> tuple[Batch, list[Sequence], list[tuple[Sequence, Tensor]]]:
        tokens: list[int] = [s.tokens[s.computed] for s in decode]
        positions = [torch.tensor([s.first_position + s.computed for s in decode], dtype=torch.int64)]
        write = [torch.tensor([s.rows[s.bos + s.computed] for s in decode], dtype=torch.int64)]
        wanted = list(decode)
        logit_rows = list(range(len(decode)))
        scored: list[tuple[Sequence, Tensor]] = []
        score_rows: list[int] = []
        readings = [self._reading(s, slice(row, row + 1), s.computed + 1) for row, s in enumerate(decode)]
        for chunk in reads:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            rows = slice(len(tokens), len(tokens) + chunk.count)
            tokens += sequence.tokens[chunk.start : end]
            positions.append(torch.arange(chunk.start, end) + sequence.first_position)
            write.append(sequence.table[sequence.bos + chunk.start : sequence.bos + end])
            readings.append(self._reading(sequence, rows, end))
            if sequence.scored:
                first = max(chunk.start, len(sequence.tokens) - 1 - sequence.scored)
                last = min(end, len(sequence.tokens) - 1)
                if first < last:
                    score_rows += range(rows.start + first - chunk.start, rows.start + last - chunk.start)
                    scored.append((sequence, torch.tensor(sequence.tokens[first + 1 : last + 1])))
            elif end == len(sequence.tokens):
                wanted.append(sequence)
                logit_rows.append(rows.stop - 1)
        update_spans = self._update_spans(updates, tokens, positions)
        given, places, written, asked = self._sent(
            torch.tensor(tokens, dtype=torch.int64),
            torch.cat(positions),
            torch.cat(write),
            torch.tensor(logit_rows + score_rows, dtype=torch.int64),
        )
        batch = Batch(
            tokens=given,
            positions=places,
            write_rows=written,
            logit_rows=asked,
            attend=self.backbone.operations.prepare(readings, len(decode)) if readings else None,
            updates=update_spans,
        )
        return batch, wanted, scored

    def _sent(self, *lists: Tensor) -> tuple[Tensor, ...]:
        """The lists (int64, on the host) on the device, in one copy that nobody waits for."""
        together, device = torch.cat(lists), self.backbone.device
        if device.type == "cuda":
            together = together.pin_memory()
        there = together.to(device, non_blocking=True)
        return torch.split(there, [len(each) for each in lists])

    def _reading(self, sequence: Sequence, rows: slice, computed: int) -> Reading:
        pool = sequence.memory.initialized and sequence.view.hot is not None
        return Reading(
            rows,
            sequence.view.hot if pool else None,
            sequence.memory.slot if pool else None,
            sequence.table,
            sequence.bos + computed,
        )

    def _update_spans(
        self, updates: list[UpdateChunk], tokens: list[int], positions: list[Tensor]
    ) -> list[UpdateSpan]:
        """Appends the updates' rows to ``tokens`` and ``positions``, the tails' positions behind all of them."""
        own_rows = len(tokens) + sum(len(chunk.tokens) for chunk in updates)
        num_tokens = self.backbone.config.num_tokens
        first_rank = self.backbone.config.first_rank_position
        spans: list[UpdateSpan] = []
        tail_start, output_start = own_rows, own_rows
        tail_positions: list[Tensor] = []
        # of equal length side by side: they become one product
        for chunk in sorted(updates, key=lambda chunk: len(chunk.tokens)):
            update = chunk.update
            rows = slice(len(tokens), len(tokens) + len(chunk.tokens))
            tokens += chunk.tokens
            positions.append(torch.arange(len(chunk.tokens)) + update.prefix + chunk.start)
            tail_rows = tail_outputs = None
            if chunk.start == 0 and update.tail is not None:
                tail_rows = slice(tail_start, tail_start + num_tokens)
                tail_start = tail_rows.stop
                tail_positions.append(torch.arange(num_tokens) + first_rank)
                if update.short:
                    tail_outputs = slice(output_start, output_start + update.short)
                    output_start = tail_outputs.stop
            spans.append(UpdateSpan(update, rows, chunk.start, len(chunk.tokens), tail_rows, tail_outputs))
        positions += tail_positions
        return spans
