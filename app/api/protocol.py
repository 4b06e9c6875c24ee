"""HTTP as uvicorn parses it, with the time at which each request came in, and a way to cut its connection."""

from __future__ import annotations

import time

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Protocol(HttpToolsProtocol):
    """Notes ``scope["began"]`` before a task is made: while many come in at once, each waits for those before it."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["began"] = time.perf_counter()  # type: ignore[typeddict-unknown-key]
        # closing would wait for a client that does not read
        self.scope["abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]
