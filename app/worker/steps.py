"""A step carried out: a plan becomes a batch, and what the device makes of it reaches the requests.

In two halves, so that the next plan can be made between them, while the device works.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from app import logs
from app.model.sampling import choose
from app.worker.jobs import Job, Plan
from app.worker.numbers import Numbers
from app.worker.pace import Spent
from app.worker.reads import Reads
from app.worker.rebuilds import RebuildRun
from app.worker.runner import ReadChunk, Runner, Stepped, UpdateChunk
from app.worker.updates import UpdateRun

Run = UpdateRun | RebuildRun


@dataclass
class Issued:
    """A step that the device is at: ``runs`` are those of its updates' contexts. ``began``: monotonic seconds."""

    began: float
    rows: int
    reads: list[ReadChunk] = field(default_factory=list)
    updates: list[UpdateChunk] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    stepped: Stepped | None = None

    @property
    def reading(self) -> bool:
        """Whether anybody waits for the next token of a generation or of a score."""
        return bool(self.rows or self.reads)


class Steps:
    """``run_of`` names an update's run by its job; ``computed`` is told of each whose context has been read."""

    def __init__(
        self,
        runner: Runner,
        reads: Reads,
        numbers: Numbers,
        *,
        run_of: Callable[[Job], Run],
        computed: Callable[[Run], None],
    ) -> None:
        self.runner = runner
        self._reads, self._numbers = reads, numbers
        self._run_of, self._computed = run_of, computed

    def issue(self, plan: Plan) -> Issued:
        """Hands the step to the device. Nothing of it may end before ``settle``."""
        decode = [self._reads.sequence(job.id) for job in plan.decode]
        issued = Issued(time.monotonic(), len(decode))
        for chunk in plan.chunks:
            if chunk.job.reads:
                sequence = self._reads.sequence(chunk.job.id)
                issued.reads.append(ReadChunk(sequence, chunk.start, chunk.count))
                self._numbers.count("prompt_tokens_total", chunk.count)
            else:
                run = self._run_of(chunk.job)
                assert run.current is not None
                tokens = run.context.tokens[chunk.start : chunk.start + chunk.count]
                # a rebuild goes on from blocks of its own
                memory = run.memory if isinstance(run, UpdateRun) else None
                issued.updates.append(UpdateChunk(run.current, chunk.start, tokens, memory, run.version))
                issued.runs.append(run)
                self._numbers.count("update_tokens_total", chunk.count)
        issued.stepped = self.runner.step(decode, issued.reads, issued.updates)
        self._numbers.count("steps_total")
        return issued

    def settle(self, issued: Issued) -> Spent:
        """Waits for the device and hands on what it made."""
        stepped = issued.stepped
        assert stepped is not None
        if stepped.sequences:
            samplers = [s.sampler for s in stepped.sequences if s.sampler is not None]
            self._reads.accept(stepped.sequences, choose(stepped.logits, samplers))
        self._settle_scores(issued, stepped)
        if not stepped.sequences and not stepped.scored:
            # nothing has been read from the device, and what the step was given is written over by the next
            self.runner.wait()
        for run in issued.runs:
            if run.current is not None and run.current.finished:
                with logs.about(run.job.id):
                    self._computed(run)
        return Spent(
            issued.rows,
            prompts=sum(chunk.count for chunk in issued.reads),
            updates=sum(chunk.rows for chunk in issued.updates),
            seconds=time.monotonic() - issued.began,
        )

    def _settle_scores(self, issued: Issued, stepped: Stepped) -> None:
        start = 0
        for sequence, targets in stepped.scored:
            sequence.score(targets, stepped.scores[start : start + len(targets)])
            start += len(targets)
        for chunk in issued.reads:
            if chunk.sequence.scored:
                self._reads.advance_score(chunk.sequence)
