"""Pages in a browser that may call the server: those of the origins that it was started with, and no others (CORS)."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import error_response
from app.errors import Forbidden

_METHODS = ("GET", "HEAD", "POST", "DELETE")
# what a page may read of an answer beside its body
_EXPOSED = ("x-request-id", "retry-after", "x-should-retry")


class Origins(CORSMiddleware):
    """Lets browsers ask before they send (a preflight, which has no key), and show answers to the pages that asked.

    A page may send whatever headers it likes: OpenAI's client has many of its own. No cookies are meant by that.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=("*",),
            expose_headers=_EXPOSED,
        )
        # a page of the internet's, a server on this machine or network: whoever names the origin wants that. Set
        # here, as Starlette's constructor knows it since 0.51 only
        self.allow_private_network = True

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        return response if response.status_code == 200 else _Refused()


class _Refused(Response):
    """As any other error: Starlette's own is plain text."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = Forbidden("pages of this origin may not send such requests; --allow-origin names whose may")
        await error_response(error, scope["request_id"])(scope, receive, send)
