"""What the scheduler orders: jobs, their sizes in tokens, and how far they are. No torch, no I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    GENERATE = "generate"
    SCORE = "score"
    UPDATE = "update"


class Phase(Enum):
    """WAITING in its tenant's queue; PREFILL: prompt or context tokens left; DECODE: one token a step.

    HELD: an update whose block is on its way to the store or waits for the last reader of an old version.
    """

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    HELD = "held"


@dataclass(eq=False)
class Job:
    """One request. ``length`` is the prompt's tokens, or those of the update's current context.

    ``room`` is the cache rows it takes (prompt and completion; 0 for updates). ``arrival`` and ``deadline``
    are seconds of the caller's clock. ``atomic``: all of ``length`` in one step; ``held_first``: begins HELD.
    ``weight`` is the tenant's share among others (None: as before). ``rested``: it had no part in the last step, for
    the sake of another tenant's first token. ``decoded``: the number of the step that it last decoded in.
    ``tail``: rows of the newest block that an update's first chunk is read beside; ``working``: an update that has
    memory of the device for its context or its block. ``rebuilds``: it makes a whole memory.
    A job that does not need the memory on the device (``needs_memory`` False) begins without it.
    """

    id: str
    tenant: str
    kind: Kind
    length: int
    arrival: float
    room: int = 0
    waiting_tokens: int = 0
    deadline: float | None = None
    priority: int = 0
    weight: float | None = None
    atomic: bool = False
    held_first: bool = False
    needs_memory: bool = True
    phase: Phase = Phase.WAITING
    done: int = 0
    rested: bool = False
    decoded: int = 0
    tail: int = 0
    working: bool = False
    rebuilds: bool = False

    @property
    def reads(self) -> bool:
        return self.kind is not Kind.UPDATE

    @property
    def remaining(self) -> int:
        return self.length - self.done

    @property
    def decodes(self) -> bool:
        """Whether its next step takes one token: its prompt has been read, or the step that does so has begun."""
        if self.phase is Phase.PREFILL:
            return self.kind is Kind.GENERATE and not self.remaining
        return self.phase is Phase.DECODE


@dataclass(frozen=True)
class Chunk:
    """``count`` tokens of a job's prompt or context, from ``start`` on."""

    job: Job
    start: int
    count: int


@dataclass
class Plan:
    """One step. ``start``: jobs that leave the queue now (their chunks are in it already); ``rest``: those that

    have no part in it for the sake of another's first token; ``wanted``: tenants whose memory must be brought, most
    urgent first, True if it is to be read; ``expired``: jobs whose deadline has passed.
    """

    start: list[Job] = field(default_factory=list)
    decode: list[Job] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    rest: list[Job] = field(default_factory=list)
    wanted: list[tuple[str, bool]] = field(default_factory=list)
    expired: list[Job] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        return not self.decode and not self.chunks
