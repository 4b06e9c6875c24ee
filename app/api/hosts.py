"""By which names a server without keys may be called.

A page of a stranger's can have its own name resolve to this machine once it is loaded (DNS rebinding): for the browser
it then asks its own server, and reads and writes what it likes. It can't change the name, and that is in ``Host``.
"""

from __future__ import annotations

import socket

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.access import METRICS, OPEN_PATHS
from app.api.errors import error_response
from app.errors import HostNotAllowed
from app.settings import Settings

# browsers ask nobody for the first; the second is never given away, and containers call their machine so
# (host.docker.internal)
_NOBODYS = (".localhost", ".internal")


def asks_for_host(settings: Settings, *, keys: bool, loopback: bool) -> bool:
    """Whether the name matters: there are no keys, and either the server listens on the loopback alone, with nothing
    in front of it that lets in whoever may come, or names were given."""
    return not keys and (bool(settings.allow_host) or (loopback and not settings.insecure))


class Hosts:
    """ASGI middleware: refuses requests under names that somebody on the internet may have. What is told to anyone,
    key or not, is told under any name."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        own = socket.gethostname().lower()
        short = own.partition(".")[0]
        self._names = {"", "localhost", own, short, f"{short}.local", *settings.allow_host}
        self._open = OPEN_PATHS | ({METRICS} if settings.open_metrics else frozenset())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open or self._is_known(scope):
            await self.app(scope, receive, send)
            return
        error = HostNotAllowed(
            "this server has no API keys, and is not known under the name in the Host header: use localhost or an "
            "address, or start it with --allow-host and the name"
        )
        await error_response(error, scope["request_id"])(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        """Under every name that it gives, should there be several. No browser gives none."""
        return all(self._allowed(_name(value)) for name, value in scope["headers"] if name == b"host")

    def _allowed(self, name: str) -> bool:
        return name in self._names or name.endswith(_NOBODYS) or _is_address(name)


def _name(host: bytes) -> str:
    """What is before the port, in small letters, without the dot of the root."""
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text.partition("]")[0]
    return text.partition(":")[0].removesuffix(".")


def _is_address(name: str) -> bool:
    """An IPv6 address, which has a bracket, or an IPv4 address, however short: no name ends in a number."""
    last = name.rpartition(".")[2]
    return name.startswith("[") or (last.isascii() and last.isdigit())
