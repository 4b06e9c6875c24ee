"""Generations and scores while they run: from the view they take to the answer they end in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from app.memory.arena import Arena, Memory
from app.messages import (
    Answer,
    Decoded,
    Finished,
    Generate,
    Sampling,
    Score,
    Scored,
    Timings,
    TokenLogprob,
    Tokens,
)
from app.model.backbone import Backbone
from app.model.sampling import Chosen, Likelihood, Sampler
from app.worker.jobs import Job, Phase
from app.worker.numbers import Numbers
from app.worker.rows import Rows
from app.worker.sequence import Sequence, begin


@dataclass(eq=False)
class Read:
    """One request. Its stages' times are seconds of the monotonic clock; 0 until they are reached."""

    message: Generate | Score
    job: Job
    arrival: float
    wanted: float = 0.0
    started: float = 0.0
    first_token: float = 0.0
    sequence: Sequence | None = None
    told_version: bool = False


class Reads:
    """All reads, waiting or running. ``finish`` takes a job out of the scheduler, ``emit`` sends an answer."""

    def __init__(
        self,
        backbone: Backbone,
        arena: Arena,
        rows: Rows,
        numbers: Numbers,
        *,
        finish: Callable[[Job], None],
        emit: Callable[[Answer], None],
    ) -> None:
        self._backbone, self._arena, self._rows = backbone, arena, rows
        self._numbers = numbers
        self._finish, self._emit = finish, emit
        self._reads: dict[str, Read] = {}

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._reads

    def add(self, message: Generate | Score, job: Job) -> None:
        """A read that waits in the scheduler's queue."""
        self._reads[job.id] = Read(message, job, job.arrival)

    def sequence(self, job_id: str) -> Sequence:
        """The running read's sequence."""
        sequence = self._reads[job_id].sequence
        assert sequence is not None
        return sequence

    # ------------------------------------------------------------ beginning

    def start(self, job: Job, memory: Memory, now: float, wanted: float) -> None:
        """Takes the newest view and cache rows. ``wanted`` is when the memory was first asked for."""
        read = self._reads[job.id]
        read.started, read.wanted = now, max(wanted, read.arrival)
        message, view = read.message, self._arena.read(memory)
        pages, rows = self._rows.take(job.room)
        sequence = begin(
            job.id,
            memory,
            view,
            list(message.tokens) if isinstance(message, Generate) else message.prompt + message.continuation,
            pages,
            rows,
            has_bos=self._backbone.config.add_bos_embedding,
            prompt_position=self._backbone.config.prompt_position,
        )
        if isinstance(message, Generate):
            sequence.sampler = self._sampler(message.sampling, sequence.tokens)
            sequence.max_tokens = message.sampling.max_tokens
            sequence.stop_tokens = frozenset(message.sampling.stop_tokens)
        else:
            sequence.scored = len(message.continuation)
        read.sequence = sequence

    def _sampler(self, s: Sampling, prompt: list[int]) -> Sampler:
        sampler = Sampler(s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty, s.seed, s.logprobs)
        if s.repetition_penalty != 1:
            seen = torch.zeros(self._backbone.config.vocab_size, dtype=torch.bool)
            seen[prompt] = True
            sampler.seen = seen.to(self._backbone.device)
        return sampler

    # ------------------------------------------------------------ going on

    def accept(self, sequences: list[Sequence], chosen: Chosen) -> None:
        """The next token of each generation: sent on, or the end of it."""
        ids: list[str] = []
        tokens: list[int] = []
        stopped: list[tuple[Read, int]] = []
        full: list[Read] = []
        for row, (sequence, token) in enumerate(zip(sequences, chosen.tokens, strict=True)):
            read = self._reads[sequence.id]
            if read.job.phase is Phase.PREFILL:
                read.job.phase = Phase.DECODE
                read.first_token = time.monotonic()
                self._numbers.observe("request_prefill_time_seconds", read.first_token - read.started)
            if token in sequence.stop_tokens:
                stopped.append((read, token))
                continue
            sequence.tokens.append(token)
            if read.told_version and row not in chosen.likelihoods:
                ids.append(sequence.id)
                tokens.append(token)
            else:
                self._tell(read, sequence, token, chosen.likelihoods.get(row))
            if sequence.produced == sequence.max_tokens:
                full.append(read)
        self._numbers.count("generation_tokens_total", len(sequences) - len(stopped))
        if ids:
            self._emit(Decoded(ids, tokens))
        for read in full:
            self._end(read, "length")
        for read, token in stopped:
            self._end(read, "stop", stop_token=token)

    def _tell(self, read: Read, sequence: Sequence, token: int, likelihood: Likelihood | None) -> None:
        """A token in a message of its own, since there is more to say than the token."""
        version = None if read.told_version else sequence.view.version
        read.told_version = True
        logprobs = None if likelihood is None else [TokenLogprob(*likelihood)]
        self._emit(Tokens(sequence.id, [token], logprobs, version))

    def advance_score(self, sequence: Sequence) -> None:
        """Answers a score all of whose tokens have been read."""
        if sequence.computed == len(sequence.tokens) - 1:
            self._emit(Scored(sequence.id, sequence.logprobs, sequence.greedy, sequence.view.version))
            self.release(sequence.id)

    # ------------------------------------------------------------ ending

    def cancel(self, job_id: str, reason: str = "cancelled") -> None:
        """Ends the read here; what it has sent stands."""
        if job_id in self._reads:
            self._end(self._reads[job_id], reason)

    def _end(self, read: Read, reason: str, *, stop_token: int | None = None) -> None:
        now, sequence = time.monotonic(), read.sequence
        if isinstance(read.message, Generate):
            self._emit(
                Finished(
                    read.job.id,
                    reason,
                    memory_version=0 if sequence is None else sequence.view.version,
                    prompt_tokens=len(read.message.tokens),
                    completion_tokens=0 if sequence is None else sequence.produced,
                    timings=Timings(
                        queue=(read.started or now) - read.arrival,
                        load=max(0.0, read.started - read.wanted),
                        first_token=max(0.0, read.first_token - read.arrival),
                        total=now - read.arrival,
                    ),
                    stop_token=stop_token,
                )
            )
            self._numbers.count(f"request_success_total:{reason}")
            if read.first_token:
                self._numbers.observe("request_decode_time_seconds", now - read.first_token)
        self.release(read.job.id)

    def release(self, job_id: str) -> None:
        """Takes the read out and gives back what it held, without an answer."""
        read = self._reads.pop(job_id)
        self._finish(read.job)
        if read.sequence is not None:
            self._rows.give(read.sequence.pages)
            self._arena.release(read.sequence.memory, read.sequence.view)
