"""One request to a worker and the answers to it, in order."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from types import TracebackType
from typing import Protocol, Self

from app.api.admission import Place
from app.errors import ClientTooSlow, DeadlineExceeded, ServiceError
from app.messages import (
    Cancel,
    Finished,
    Generate,
    GetHistory,
    GetMemory,
    GetTenant,
    GetTexts,
    ListTenants,
    Question,
    Reply,
    Request,
    Score,
    Scored,
    TokenLogprob,
    Tokens,
    Update,
    Updated,
    UpdateProgress,
)

# after its deadline a request's worker has this long to say so
LATE_SECONDS = 2.0

Part = Tokens | Finished | UpdateProgress | Updated | Scored | Reply


class ClientGone(Exception):
    """The HTTP client closed its connection before it was answered."""


class Client(Protocol):
    """What a stream asks of the client it belongs to."""

    def submit(self, stream: Stream) -> None: ...

    def forget(self, id: str) -> None: ...

    def send(self, message: Request) -> None: ...


class Stream:
    """The answers to one request, in order. Use as a context manager: leaving it early cancels a generation."""

    def __init__(self, client: Client, request: Question, place: Place | None = None) -> None:
        self.request, self._place = request, place
        self._client = client
        # a number is a token of which there is no more to say
        self._parts: deque[Part | int | ServiceError | ClientGone] = deque()
        self._some = asyncio.Event()
        self._final = False
        # of a stream whose reader may be slow: the answers kept for him (None: any number)
        self.backlog: int | None = None
        self._late: asyncio.TimerHandle | None = None
        # whether it is with the worker, at how many ends of one it was, and whether anything came back
        self.sent, self.crashes, self.answered = False, 0, asyncio.Event()

    async def next(self) -> Part:
        """The next answer. Raises the ServiceError the request ends in, or ClientGone.

        Tokens that have come meanwhile are handed over together: who is behind catches up at the price of one.
        """
        if not self._parts:
            self._some.clear()
            await self._some.wait()
        part = self._parts.popleft()
        if isinstance(part, Exception):
            raise part
        if not isinstance(part, int | Tokens):
            return part
        more: list[int | Tokens] = [part]
        while self._parts and isinstance(following := self._parts[0], int | Tokens):
            more.append(following)
            self._parts.popleft()
        return _together(self.request.id, more)

    @property
    def ended(self) -> bool:
        return self._final

    @property
    def repeatable(self) -> bool:
        """Whether it may be sent to another worker without anybody noticing that it was sent before."""
        if isinstance(self.request, Generate | Score):
            return not self.answered.is_set()
        if isinstance(self.request, Update):
            # its key makes another attempt go on where this one ended
            return self.request.idempotency_key is not None
        return isinstance(self.request, GetTenant | ListTenants | GetMemory | GetHistory | GetTexts)

    def put(self, part: Part | ServiceError) -> None:
        if self._place is not None and not (self.answered.is_set() and isinstance(part, Tokens)):
            self._place.heard(part)
        self.answered.set()
        if self._final:
            return
        if self.backlog is not None and isinstance(part, Tokens) and len(self._parts) >= self.backlog:
            self.cancel()
            part = ClientTooSlow("the stream was not read as fast as it was made")
        self._final = not isinstance(part, Tokens | UpdateProgress)
        self._add(part)

    def put_token(self, token: int) -> None:
        """As ``put`` with a Tokens of this one."""
        if not self.answered.is_set() or (self.backlog is not None and len(self._parts) >= self.backlog):
            self.put(Tokens(self.request.id, [token]))
        elif not self._final:
            self._parts.append(token)
            self._some.set()

    def _add(self, part: Part | ServiceError | ClientGone) -> None:
        self._parts.append(part)
        self._some.set()

    def guard(self) -> None:
        """Ends the request if the worker has not done so by its deadline, as one that hangs does not."""
        deadline = self.request.deadline if isinstance(self.request, Generate | Score) else None
        if deadline is not None:
            seconds = deadline - time.time() + LATE_SECONDS
            self._late = asyncio.get_running_loop().call_later(seconds, self._is_late)

    def _is_late(self) -> None:
        if not self._final:
            self.cancel()
            self.put(DeadlineExceeded("the request's deadline has passed"))

    def client_gone(self) -> None:
        """The HTTP client has gone; whoever waits in ``next`` learns it, after what came before."""
        self._add(ClientGone())

    def cancel(self, reason: str = "cancelled") -> None:
        """Ends a generation early; its Finished still comes."""
        self._client.send(Cancel(self.request.id, reason))

    def __enter__(self) -> Self:
        self._client.submit(self)
        self.guard()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._late is not None:
            self._late.cancel()
        self._client.forget(self.request.id)
        if self.sent and not self._final and isinstance(self.request, Generate | Score):
            self.cancel()


def _together(id: str, parts: list[int | Tokens]) -> Tokens:
    """Logprobs come with all tokens of a generation or with none, the version with its first."""
    first = parts[0]
    if isinstance(first, Tokens) and len(parts) == 1:
        return first
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    for part in parts:
        if isinstance(part, int):
            tokens.append(part)
        else:
            tokens += part.tokens
            logprobs += part.logprobs or []
    version = first.memory_version if isinstance(first, Tokens) else None
    return Tokens(id, tokens, logprobs or None, version)
