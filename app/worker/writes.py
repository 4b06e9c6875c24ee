"""Updates as requests: taken, begun, told of and ended. How one is carried out is ``updates``'."""

from __future__ import annotations

import time
from collections.abc import Callable

from app.errors import ServiceError
from app.memory.arena import Memory
from app.memory.residency import Residency
from app.messages import Answer, Timings, Update, Updated, UpdateProgress
from app.store.base import BlockRecord
from app.worker.jobs import Job, Phase
from app.worker.numbers import Numbers
from app.worker.updates import Background, UpdateRun, Updates, digest


class Writes:
    """All updates, waiting or running.

    ``finish`` takes a job out of the scheduler, ``emit`` sends an answer and ``fail`` an error; ``news``: a memory has
    another version.
    """

    def __init__(
        self,
        residency: Residency,
        background: Background,
        numbers: Numbers,
        *,
        finish: Callable[[Job], None],
        emit: Callable[[Answer], None],
        fail: Callable[[str, ServiceError], None],
        news: Callable[[], None],
        compacted_after: int,
    ) -> None:
        self._config = residency.backbone.config
        self._numbers = numbers
        self._finish, self._emit, self._fail, self._news = finish, emit, fail, news
        self._waiting: dict[str, Update] = {}
        self._runs: dict[str, UpdateRun] = {}
        self.updates = Updates(
            residency,
            background,
            progress=self._progressed,
            finished=self._finished,
            failed=self._failed,
            compacted_after=compacted_after,
        )

    def add(self, message: Update, job: Job) -> None:
        """An update that waits in the scheduler's queue."""
        self._waiting[job.id] = message

    def start(self, job: Job, memory: Memory, now: float, loading: float) -> None:
        """``loading``: the seconds that it waited for the memory."""
        memory.pins += 1
        message = self._waiting.pop(job.id)
        run = UpdateRun(job, message, memory, digest(message), started=now, loaded=loading)
        self._runs[job.id] = run
        self.updates.begin(run)

    def run(self, job_id: str) -> UpdateRun | None:
        """The running update of this id."""
        return self._runs.get(job_id)

    def fail(self, job: Job, error: ServiceError) -> None:
        """One whose block is being written fails when that is done."""
        if self._waiting.pop(job.id, None) is not None:
            self._finish(job)
            self._fail(job.id, error)
        elif job.phase is Phase.HELD:
            self._runs[job.id].doomed = error
        else:
            self._failed(self._runs[job.id], error)

    # ------------------------------------------------------------ what becomes of a run

    def _progressed(self, run: UpdateRun) -> None:
        self._news()
        self._numbers.count("update_blocks_total")
        self._numbers.count("forgotten_tokens_total", self._config.num_tokens)
        self._emit(UpdateProgress(run.job.id, run.index, len(run.contexts), run.memory.version))

    def _finished(self, run: UpdateRun, replayed: list[BlockRecord] | None) -> None:
        """``replayed`` are the records of the same update done before, under its idempotency key."""
        now = time.monotonic()
        versions = [r.version for r in replayed] if replayed else run.versions
        shares = [self._config.surviving_share(versions[-1] - v) for v in versions]
        self._emit(
            Updated(
                run.job.id,
                memory_version=versions[-1],
                blocks=len(run.contexts),
                tokens=sum(r.tokens for r in replayed) if replayed else run.tokens,
                surviving_share=sum(shares) / len(shares),
                timings=Timings(
                    queue=run.started - run.job.arrival, load=run.loaded, total=now - run.job.arrival
                ),
                replayed=replayed is not None,
            )
        )
        self._numbers.observe("update_latency_seconds", now - run.job.arrival)
        self._end(run)

    def _failed(self, run: UpdateRun, error: ServiceError) -> None:
        self._end(run)
        self._fail(run.job.id, error)

    def _end(self, run: UpdateRun) -> None:
        run.memory.pins -= 1
        del self._runs[run.job.id]
        self._finish(run.job)
