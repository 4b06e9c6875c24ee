"""The API's end of a worker: requests go out in frames, answers come back to the request that waits for them."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import structlog

from app.api.metrics import Metrics
from app.api.tokens import Tokenizer
from app.errors import ServiceError, WorkerUnavailable, from_code
from app.messages import (
    Answer,
    Cancel,
    CreateTenant,
    Drain,
    EraseTenant,
    ExportTenant,
    Failed,
    Fatal,
    Finished,
    ForkTenant,
    Generate,
    GetHistory,
    GetMemory,
    GetTenant,
    GetTexts,
    ImportTenant,
    ListTenants,
    ModelInfo,
    Ready,
    RebuildTenant,
    Reply,
    Request,
    RollbackTenant,
    Score,
    Scored,
    Stats,
    Tokens,
    Update,
    Updated,
    UpdateProgress,
    encode,
)

log = structlog.get_logger("api")

RETRY_AFTER = 5.0

Question = (
    Generate
    | Update
    | Score
    | CreateTenant
    | ListTenants
    | GetTenant
    | EraseTenant
    | GetMemory
    | GetHistory
    | ForkTenant
    | RollbackTenant
    | ExportTenant
    | ImportTenant
    | GetTexts
    | RebuildTenant
)
Part = Tokens | Finished | UpdateProgress | Updated | Scored | Reply


class ClientGone(Exception):
    """The HTTP client closed its connection before it was answered."""


def new_id() -> str:
    """An id no other request has, for messages to the worker."""
    return uuid.uuid4().hex


class Stream:
    """The answers to one request, in order. Use as a context manager: leaving it early cancels a generation."""

    def __init__(self, client: WorkerClient, request: Question) -> None:
        self.request = request
        self._client = client
        self._parts: asyncio.Queue[Part | ServiceError | ClientGone] = asyncio.Queue()
        self._final = False

    async def next(self) -> Part:
        """The next answer. Raises the ServiceError the request ends in, or ClientGone."""
        part = await self._parts.get()
        if isinstance(part, Exception):
            raise part
        return part

    def put(self, part: Part | ServiceError) -> None:
        self._final = not isinstance(part, Tokens | UpdateProgress)
        self._parts.put_nowait(part)

    def client_gone(self) -> None:
        """The HTTP client has gone; whoever waits in ``next`` learns it, after what came before."""
        self._parts.put_nowait(ClientGone())

    def cancel(self) -> None:
        """Ends a generation early; its Finished still comes."""
        self._client.send(Cancel(self.request.id))

    def __enter__(self) -> Self:
        self._client.submit(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.forget(self.request.id)
        if not self._final and isinstance(self.request, Generate | Score):
            self.cancel()


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

    # ------------------------------------------------------------ for the endpoints

    @property
    def open_requests(self) -> int:
        return len(self._open)

    def require(self) -> ModelInfo:
        """The model that is served. Raises WorkerUnavailable while there is none, or while draining."""
        if self.draining:
            raise WorkerUnavailable("the server is shutting down", retry_after=RETRY_AFTER)
        if self.model is None:
            raise WorkerUnavailable(self.reason, retry_after=RETRY_AFTER)
        return self.model

    def open(self, request: Question) -> Stream:
        """The answers to ``request``, which is sent when the stream is entered."""
        return Stream(self, request)

    async def ask(self, request: Question) -> Part:
        """The one answer to a request that has one. Raises the ServiceError it fails with."""
        with self.open(request) as stream:
            part = await stream.next()
            while isinstance(part, Tokens | UpdateProgress):
                part = await stream.next()
            return part

    # ------------------------------------------------------------ for the streams

    def submit(self, stream: Stream) -> None:
        self.require()
        self._open[stream.request.id] = stream
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

    def detach(self, reason: str) -> None:
        """The incarnation is gone: every open request ends in WorkerUnavailable."""
        self._transport = None
        self.model = None
        self.settled.clear()
        self.reason = reason
        if self._loading is not None:
            self._loading.cancel()
            self._loading = None
        self.metrics.worker_gone()
        self.end(reason)

    def drain(self, seconds: float) -> None:
        """Nothing new from here on; the worker finishes what runs, then exits."""
        self.draining = True
        self.send(Drain(seconds))

    def end(self, reason: str) -> None:
        """Every open request ends in WorkerUnavailable."""
        open_streams, self._open = self._open, {}
        for stream in open_streams.values():
            stream.put(WorkerUnavailable(reason, retry_after=RETRY_AFTER))

    def received(self, answers: Sequence[Answer], now: float) -> None:
        """Hands each answer to the request that waits for it; answers to nobody are dropped."""
        self.last_heard = now
        for answer in answers:
            if isinstance(answer, Stats):
                self.metrics.worker_stats(answer)
            elif isinstance(answer, Ready):
                self._loading = asyncio.get_running_loop().create_task(self._load(answer.model))
            elif isinstance(answer, Fatal):
                self.fatal = answer.message
            elif stream := self._open.get(answer.id):
                if isinstance(answer, Failed):
                    error = from_code(
                        answer.code, answer.message, param=answer.param, retry_after=answer.retry_after
                    )
                    stream.put(error)
                else:
                    stream.put(answer)

    async def _load(self, model: ModelInfo) -> None:
        try:
            self.tokenizer = await asyncio.to_thread(Tokenizer.load, model.path)
        except Exception as error:
            log.exception("tokenizer cannot be loaded", path=model.path)
            self.reason = f"the tokenizer cannot be loaded: {error}"
            self.settled.set()
            return
        self.model = model
        self.reason = ""
        self.settled.set()


class Workers:
    """The workers of all devices; a tenant always goes to the same one."""

    def __init__(self, clients: Sequence[WorkerClient]) -> None:
        self.clients = tuple(clients)

    def of(self, tenant: str) -> WorkerClient:
        """By rendezvous hash: a worker more or less moves only the tenants that it gains or loses."""
        if len(self.clients) == 1:
            return self.clients[0]
        weights = (
            hashlib.blake2b(f"{number}/{tenant}".encode(), digest_size=8).digest()
            for number in range(len(self.clients))
        )
        return max(zip(weights, self.clients, strict=True), key=lambda pair: pair[0])[1]
