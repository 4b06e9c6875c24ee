"""HTTP as uvicorn parses it, with the time at which each request came in, a way to cut its connection, and an end to
requests that have none: what comes before a key is looked at, and what is in no body, is bounded here."""

from __future__ import annotations

import asyncio
import json
import time
import uuid

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.api.errors import error_body
from app.errors import HeadersTooLarge, MalformedRequest, RequestTooSlow, ServiceError

# of a request line with its headers, or of trailers; pieces are joined on the loop, each time it takes longer
MOST_BYTES = 64 << 10
# from its first byte, or from that of the connection, to the end of its headers
HEADERS_SECONDS = 20.0
# for what is left of a body whose request was answered before: the largest at the slowest that any may come
REST_SECONDS = 160.0


class Protocol(HttpToolsProtocol):
    """Notes ``scope["began"]`` before a task is made: while many come in at once, each waits for those before it."""

    # of the next message: whether it is before its body, and anything of it has come
    _heading, _begun = True, False
    # since the headers were complete, a piece of a body came, or a message ended; whatever else came with these
    # in one piece is left out, which is little
    _outside = 0
    _late: asyncio.TimerHandle | None = None
    # the head of a message that asks for another protocol, as it would be if it did not
    _plain = b""
    _refusal: ServiceError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait(HEADERS_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # empty lines before a request are no message yet, and may not come for ever either
        self._begun = self._begun or self._heading
        self._outside += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("")
        if self.transport.is_closing():
            return
        if self._outside > MOST_BYTES:
            self._refuse(_too_large())
        elif self._heading and self._begun:
            self._wait(HEADERS_SECONDS)

    def _parse(self, data: bytes | memoryview) -> None:
        """Whoever asks for another protocol, as Java's HTTP client does for HTTP/2, is answered in this one, as if
        he had not. The parser believes that his message ends with its headers, and stops there: another one is given
        the message without the header that asks, and then what came behind it, so that its body is read as any other.
        """
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as asked:
                data = memoryview(data)[asked.args[0] :]
            began = self.scope["began"]  # type: ignore[typeddict-item]
            # the first one takes nothing more, if the connection is to be closed behind the message
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(self._plain)
            self.scope["began"] = began  # type: ignore[typeddict-unknown-key]

    # ------------------------------------------------------------ the parser's callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = True
        self.scope["began"] = time.perf_counter()  # type: ignore[typeddict-unknown-key]
        # closing would wait for a client that does not read
        self.scope["abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MOST_BYTES:
            # for the parser any error is one of the request, and answered by ``send_400_response``
            self._refusal = _too_large()
            raise self._refusal
        if self.parser.should_upgrade():
            self._plain = self._without_upgrade()
            return
        # this may find them wrong too
        super().on_headers_complete()
        self._heading, self._outside = False, 0
        self._arrived()

    def on_body(self, body: bytes) -> None:
        self._outside = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            # its body, if it has one, is still to come
            return
        super().on_message_complete()
        self._heading, self._begun, self._outside = True, False, 0
        self._arrived()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._heading and not self.transport.is_closing():
            self._wait(REST_SECONDS)

    def _without_upgrade(self) -> bytes:
        """The request's line and headers but ``Upgrade``, which a server may ignore. All others stay as they came:
        where its body ends is for the parser to say. Raises MalformedRequest for CONNECT, behind which is no HTTP."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refusal = MalformedRequest("this server is no proxy: it takes no CONNECT")
            raise self._refusal
        lines = [b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    # ------------------------------------------------------------ its ends

    def _wait(self, seconds: float) -> None:
        if self._late is None:
            self._late = self.loop.call_later(seconds, self._too_late)

    def _arrived(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        self._late = None
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # it is the client who waits, and while he does nothing may be read
            self._wait(HEADERS_SECONDS)
        elif self._heading and self._begun:
            self._refuse(RequestTooSlow("the request's headers come too slowly, or have stopped"))
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """As uvicorn calls it when its parser gives up."""
        self._refuse(self._refusal or MalformedRequest("this is no valid HTTP request"))

    @staticmethod
    def refused(error: ServiceError, request_id: str) -> None:
        """Told of each answer that is given here, which no middleware sees."""

    def _refuse(self, error: ServiceError) -> None:
        """Answers in the one shape, where an answer is what comes next on this connection, and closes it."""
        cycle = self.cycle
        if self._heading:
            awaited = cycle is None or cycle.response_complete
        else:
            awaited = not self.pipeline and not cycle.response_started
        if awaited:
            request_id = uuid.uuid4().hex
            body = json.dumps(error_body(error, request_id), separators=(",", ":")).encode()
            head = (
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
                f"x-request-id: {request_id}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(STATUS_LINE[error.status] + head.encode() + body)
            self.refused(error, request_id)
        if cycle is not None and not cycle.response_complete:
            # whoever is at work on the request has nobody to answer, from now on
            cycle.disconnected = True
        self.transport.close()


def _too_large() -> HeadersTooLarge:
    return HeadersTooLarge(f"the request line and headers are larger than the {MOST_BYTES:,} bytes allowed")
