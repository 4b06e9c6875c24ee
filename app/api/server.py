"""The server: uvicorn and the worker's supervisor in one loop, from the first socket to the last answer."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import signal
import socket
import sys
from collections.abc import Sequence

import structlog

from app import headstart, logs
from app.api.spool import Spool
from app.api.supervisor import Supervisor, WorkerCannotStart
from app.api.worker import WorkerClient
from app.errors import SHUT_DOWN
from app.headstart import WORKER
from app.keys.file import BadKeysFile
from app.keys.watch import WatchedRing
from app.messages import WORKER_LAST_SECONDS
from app.settings import Settings

log = structlog.get_logger("api")

# connections that are still open after the drain are cut after this
_LAST_SECONDS = 2.0
_BACKLOG = 2048


def run_server(settings: Settings, *, command: Sequence[str] = WORKER) -> int:
    """Serves until SIGTERM or SIGINT and returns the exit code.

    0: drained and ended; 1: could not listen, or may not without keys, or the worker could not start (the reason is
    on standard error).
    """
    logs.configure(settings)
    logs.own_process()
    try:
        keys = None if settings.keys_file is None else WatchedRing(settings.keys_file)
    except BadKeysFile as error:
        print(str(error), file=sys.stderr)
        return 1
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        print(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}",
            file=sys.stderr,
        )
        return 1
    if keys is None and not settings.insecure and not _is_loopback(listener):
        listener.close()
        print(
            f"{settings.host} can be reached from the network, and there are no API keys: anyone who reaches it could "
            "read and change every memory. Make keys (memoryllm keys create) and give --keys-file, or say --insecure "
            "if something in front of the server asks for them",
            file=sys.stderr,
        )
        return 1
    with listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(settings, listener, keys, command))


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


async def _serve(
    settings: Settings, listener: socket.socket, keys: WatchedRing | None, command: Sequence[str]
) -> int:
    # from the first moment on: a server that is still loading ends with 0 too
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(logs.loop_error)

    def stop_now() -> None:
        # asked twice: whoever asks does not want to wait
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop_now)
    client = WorkerClient()
    supervisor = Supervisor(settings, client, command=command, begun=headstart.take())
    spool = Spool(settings.spool_dir, settings.max_transfers)
    spool.sweep()
    worker = asyncio.create_task(supervisor.run())
    # the worker is what takes long to be ready: the rest of this process is imported beside it
    started = asyncio.create_task(supervisor.started.wait())
    await asyncio.wait([worker, started], return_when=asyncio.FIRST_COMPLETED)
    from app.api.web import web_server

    server = web_server(
        settings, client, spool, keys, loopback=_is_loopback(listener), last_seconds=_LAST_SECONDS
    )
    web = asyncio.create_task(server.serve(sockets=[listener]))
    asked = asyncio.create_task(stop.wait())
    settled = asyncio.create_task(_freeze_when_settled(client))
    announce(settings, listener)
    try:
        await asyncio.wait([worker, web, asked], return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            await _drain(client, worker, web, hurry, settings.drain_timeout)
        server.should_exit = True
        await web
        return _exit_code(worker)
    finally:
        for task in (asked, worker, started, settled):
            task.cancel()
        await asyncio.gather(worker, asked, started, settled, return_exceptions=True)
        spool.close()


async def _freeze_when_settled(client: WorkerClient) -> None:
    """What is loaded by the time the server is ready stays to the end. Looking through all of it for garbage holds
    every request up for a tenth of a second, the more often the more of them there are."""
    await client.settled.wait()
    gc.freeze()


async def _drain(
    client: WorkerClient,
    worker: asyncio.Task[None],
    web: asyncio.Task[None],
    hurry: asyncio.Event,
    seconds: float,
) -> None:
    """New requests get 503 from here on; running ones have ``seconds`` to finish, then the worker ends.

    Every request that is still open behind that is told so: no stream ends without an event that says why.
    """
    log.info("draining", open_requests=client.open_requests, seconds=seconds)
    client.drain(seconds)
    # a worker that is still loading has nothing to finish
    if client.model is not None:
        hurried = asyncio.create_task(hurry.wait())
        # the worker itself ends what is left after ``seconds``; this is for one that does not
        await asyncio.wait(
            [worker, web, hurried],
            timeout=seconds + WORKER_LAST_SECONDS + _LAST_SECONDS,
            return_when=asyncio.FIRST_COMPLETED,
        )
        hurried.cancel()
    client.end(SHUT_DOWN)


def _exit_code(worker: asyncio.Task[None]) -> int:
    if not worker.done():
        return 0
    error = worker.exception()
    if error is None:
        return 0
    if not isinstance(error, WorkerCannotStart):
        log.error("the supervisor failed", exc_info=error)
    print(f"the worker could not start: {error}", file=sys.stderr, flush=True)
    return 1


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.Loop


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, IPv4 or IPv6. Raises OSError if the address is taken or not ours."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def announce(settings: Settings, listener: socket.socket) -> None:
    """One line with the address, port 0 resolved; and a warning where anyone on the network may come in."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"listening on http://{shown}:{port}", flush=True)
    if not ipaddress.ip_address(host).is_loopback and settings.keys_file is None:
        print(
            f"warning: {settings.host} can be reached from the network, and there are no API keys: "
            "anyone who reaches it can read and change every memory",
            file=sys.stderr,
            flush=True,
        )
