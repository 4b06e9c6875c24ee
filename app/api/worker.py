"""The API's end of a worker: requests go out in frames, answers come back to the request that waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from app.api.admission import Place
from app.api.bounds import LONGEST, SHORTEST
from app.api.metrics import Metrics
from app.api.stream import Part, Stream
from app.api.suspects import MOST_CRASHES, SERVER_KEY, Suspects, crashed
from app.api.tokens import Tokenizer
from app.errors import ServiceError, WorkerUnavailable, from_code
from app.messages import (
    Answer,
    Decoded,
    Drain,
    Failed,
    Fatal,
    Fetching,
    GetHistory,
    GetMemory,
    GetTenant,
    GetTexts,
    ListTenants,
    ModelInfo,
    Question,
    Ready,
    Request,
    Stats,
    Tokens,
    Update,
    UpdateProgress,
    encode,
)

log = structlog.get_logger("api")

# a request that waits for a new worker is given up after this
RESEND_SECONDS = 30.0
# a request that was in a worker when it ended is sent again by itself; with no answer and no crash after this, the next
ALONE_SECONDS = 1.0
_MOST_LOGGED = 16


def new_id() -> str:
    """An id no other request has, for messages to the worker."""
    return uuid.uuid4().hex


class WorkerClient:
    """Speaks with one worker process, whichever incarnation of it is attached.

    ``model`` and ``tokenizer`` are set while the worker is ready. ``reason`` says why it is not.
    """

    def __init__(self, metrics: Metrics | None = None) -> None:
        self.metrics = metrics or Metrics()
        self.model: ModelInfo | None = None
        self.tokenizer: Tokenizer | None = None
        self.reason = "the worker is starting"
        self.draining = False
        self.fatal: str | None = None
        # set once it is known whether this incarnation serves
        self.settled = asyncio.Event()
        self.last_heard = 0.0
        self._transport: Callable[[bytes], None] | None = None
        self._outbox: list[Request] = []
        self._open: dict[str, Stream] = {}
        self._loading: asyncio.Task[None] | None = None
        self._suspects = Suspects()
        self._ends = 0
        # when the worker was begun, or had its model downloaded
        self.loading_since = time.monotonic()
        # how long the last one took to be ready from then on, and when this one will be (0: not known)
        self._starting, self._ready_at = 0.0, 0.0
        # they were in a worker that ended, and wait for the next one
        self._held: deque[Stream] = deque()
        self._resending: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ for the endpoints

    @property
    def open_requests(self) -> int:
        return len(self._open)

    def require(self) -> ModelInfo:
        """The model that is served. Raises WorkerUnavailable while there is none, or while draining."""
        if self.draining:
            raise WorkerUnavailable("the server is shutting down", retry_after=self._retry_after())
        if self.model is None:
            raise WorkerUnavailable(self.reason, retry_after=self._retry_after())
        return self.model

    @property
    def serves(self) -> bool:
        return self.model is not None and not self.draining

    def _retry_after(self) -> float:
        """Seconds until a worker is ready, or the next server can have the place of this one, as far as is known.

        What takes longer than was thought, or of which nothing is known, takes as long again as it has.
        """
        left = abs((self._ready_at or self.loading_since) - time.monotonic())
        return min(max(left, SHORTEST), LONGEST)

    def open(self, request: Question, place: Place | None = None) -> Stream:
        """The answers to ``request``, which is sent when the stream is entered. ``place`` hears how it goes."""
        return Stream(self, request, place)

    async def ask(self, request: Question, place: Place | None = None) -> Part:
        """The one answer to a request that has one. Raises the ServiceError it fails with."""
        with self.open(request, place) as stream:
            part = await stream.next()
            while isinstance(part, Tokens | UpdateProgress):
                part = await stream.next()
            return part

    # ------------------------------------------------------------ for the streams

    def submit(self, stream: Stream) -> None:
        self.require()
        # the line of the HTTP request names it too
        structlog.contextvars.bind_contextvars(job=stream.request.id)
        self._suspects.check(stream.request)
        self._open[stream.request.id] = stream
        tenant = getattr(stream.request, "tenant", None)
        if tenant is not None and any(getattr(held.request, "tenant", None) == tenant for held in self._held):
            # what this tenant asked for before waits for its turn with a new worker: nothing passes it
            self._held.append(stream)
            return
        stream.sent = True
        self.send(stream.request)

    def forget(self, id: str) -> None:
        self._open.pop(id, None)

    def send(self, message: Request) -> None:
        """Sends with everything else that is sent in this tick of the loop. Without a worker: nothing."""
        if self._transport is None:
            return
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(message)

    def _flush(self) -> None:
        messages, self._outbox = self._outbox, []
        if self._transport is not None:
            self._transport(encode(messages))

    # ------------------------------------------------------------ for the supervisor

    def attach(self, transport: Callable[[bytes], None], now: float) -> None:
        """A new incarnation can be spoken to through ``transport``; it is not ready before its Ready."""
        self._transport = transport
        self._outbox = []
        self.fatal = None
        self.last_heard = now
        self._begin(now)

    def _begin(self, now: float) -> None:
        self.loading_since = now
        self._ready_at = now + self._starting if self._starting else 0.0

    def detach(self, reason: str) -> None:
        """The incarnation is gone. What is safe to repeat waits for the next one; the rest ends in an error."""
        was_ready, self._transport = self.model is not None, None
        if not self.draining:
            self._ready_at = time.monotonic() + self._starting if self._starting else 0.0
        self.model = None
        self.settled.clear()
        self.reason = reason
        for task in (self._loading, self._resending):
            if task is not None:
                task.cancel()
        self._loading = self._resending = None
        self.metrics.worker_gone()
        if self.draining or not was_ready:
            self.end(reason)
            return
        self._ends += 1
        inside = [stream for stream in self._open.values() if stream.sent and not stream.ended]
        if inside:
            jobs = [stream.request.id for stream in inside]
            log.warning("requests were in the worker", requests=len(jobs), jobs=jobs[:_MOST_LOGGED])
        for stream in inside:
            error = self._fate(stream, reason)
            if error is not None:
                self._fail(stream, error)
            else:
                stream.sent = False
                self._held.append(stream)
        if self._held:
            asyncio.get_running_loop().call_later(RESEND_SECONDS, self._give_up, list(self._held), reason)

    def _fate(self, stream: Stream, reason: str) -> ServiceError | None:
        """What a request ends in that was in the worker when that ended; None if it is to be tried once more."""
        stream.crashes += 1
        if not isinstance(stream.request, GetTenant | ListTenants | GetMemory | GetHistory | GetTexts):
            # looking is done again and again, and would be refused for what others do
            stream.crashes = max(stream.crashes, self._suspects.blame(stream.request, self._ends))
        if stream.crashes >= MOST_CRASHES:
            return crashed()
        return None if stream.repeatable else self._gone(stream, reason)

    def _gone(self, stream: Stream, reason: str) -> WorkerUnavailable:
        if isinstance(stream.request, Update):
            own = not (stream.request.idempotency_key or SERVER_KEY).startswith(SERVER_KEY)
            reason += "; whether the update was taken in is not known here: " + (
                "a retry with the same idempotency key is safe"
                if own
                else "the tenant's history tells, and with an idempotency key a retry would be safe"
            )
        return WorkerUnavailable(reason, retry_after=self._retry_after())

    def _fail(self, stream: Stream, error: ServiceError) -> None:
        del self._open[stream.request.id]
        stream.put(error)

    def _give_up(self, streams: list[Stream], reason: str) -> None:
        for stream in streams:
            if self.model is None and not stream.sent and self._open.get(stream.request.id) is stream:
                self._fail(stream, self._gone(stream, reason))

    async def _resend(self) -> None:
        """One after another: if it is one of them that ends workers, it is to be alone with it."""
        while self._held:
            stream = self._held.popleft()
            if self._open.get(stream.request.id) is not stream:
                continue
            stream.answered.clear()
            stream.sent = True
            self.send(stream.request)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ALONE_SECONDS):
                    await stream.answered.wait()

    def delayed(self, seconds: float) -> None:
        """The next incarnation begins only after a pause."""
        if self._ready_at:
            self._ready_at += seconds

    def drain(self, seconds: float) -> None:
        """Nothing new from here on; the worker finishes what runs, then exits."""
        self.draining = True
        self._ready_at = time.monotonic() + seconds
        self.send(Drain(seconds))

    def end(self, reason: str) -> None:
        """Every open request ends in WorkerUnavailable."""
        self._held.clear()
        for stream in list(self._open.values()):
            self._fail(stream, self._gone(stream, reason))

    def received(self, answers: Sequence[Answer], now: float) -> None:
        """Hands each answer to the request that waits for it; answers to nobody are dropped.

        First to those who have had none: what is handed on first is first with the client, and a step brings many
        streams their next tokens.
        """
        self.last_heard = now
        for answer in sorted(answers, key=self._answered):
            if isinstance(answer, Stats):
                self.metrics.worker_stats(answer)
            elif isinstance(answer, Fetching):
                # while it drains it is told for how long that goes on
                if not self.draining:
                    self._begin(now)
            elif isinstance(answer, Ready):
                self._loading = asyncio.get_running_loop().create_task(self._load(answer.model))
            elif isinstance(answer, Fatal):
                self.fatal = answer.message
            elif isinstance(answer, Decoded):
                for id, token in zip(answer.ids, answer.tokens, strict=True):
                    if going := self._open.get(id):
                        going.put_token(token)
            elif stream := self._open.get(answer.id):
                if isinstance(answer, Failed):
                    error = from_code(
                        answer.code, answer.message, param=answer.param, retry_after=answer.retry_after
                    )
                    if isinstance(error, WorkerUnavailable):
                        error.retry_after = self._retry_after()
                    stream.put(error)
                else:
                    stream.put(answer)

    def _answered(self, answer: Answer) -> bool:
        if isinstance(answer, Decoded):
            # the worker puts first tokens before it, and an end may stand behind it
            return False
        stream = None if isinstance(answer, Stats | Fetching | Ready | Fatal) else self._open.get(answer.id)
        return stream is None or stream.answered.is_set()

    async def _load(self, model: ModelInfo) -> None:
        try:
            self.tokenizer = await asyncio.to_thread(Tokenizer.load, model.path)
        except Exception as error:
            log.exception("tokenizer cannot be loaded", path=model.path)
            self.reason = f"the tokenizer cannot be loaded: {error}"
            self.settled.set()
            return
        self._starting = time.monotonic() - self.loading_since
        self.model = model
        self.reason = ""
        self.settled.set()
        self._resending = asyncio.get_running_loop().create_task(self._resend())


class Workers:
    """The workers of all devices, today one; a tenant always goes to the same one."""

    def __init__(self, clients: Sequence[WorkerClient]) -> None:
        self.clients = tuple(clients)

    def require(self) -> None:
        """Raises WorkerUnavailable if none of them serves."""
        if not any(client.serves for client in self.clients):
            self.clients[0].require()

    def of(self, tenant: str) -> WorkerClient:
        """By rendezvous hash: a worker more or less moves only the tenants that it gains or loses."""
        if len(self.clients) == 1:
            return self.clients[0]
        weights = (
            hashlib.blake2b(f"{number}/{tenant}".encode(), digest_size=8).digest()
            for number in range(len(self.clients))
        )
        return max(zip(weights, self.clients, strict=True), key=lambda pair: pair[0])[1]
