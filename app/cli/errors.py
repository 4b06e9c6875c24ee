"""What ends a command early, and the exit code that says why."""

from __future__ import annotations

import json
import sys
from typing import Any

from app.cli.output import err, visible
from app.errors import BY_CODE

NOT_STARTED, USAGE, REFUSED, UNAVAILABLE, FAILED = 1, 2, 3, 4, 5
# codes of errors that no server has made
_OWN = {USAGE: "usage", REFUSED: "refused", UNAVAILABLE: "unavailable", FAILED: "failed"}


class Refusal(Exception):
    """An error to show to the user. ``error`` is the server's own, ``as_json`` prints it for scripts."""

    def __init__(
        self,
        message: str,
        exit_code: int,
        *,
        error: dict[str, Any] | None = None,
        request_id: str | None = None,
        as_json: bool = False,
    ) -> None:
        super().__init__(message)
        self.message, self.exit_code, self.request_id = message, exit_code, request_id
        self.error, self.as_json = error, as_json

    def show(self) -> None:
        if self.as_json:
            error = self.error or {
                "message": self.message,
                "type": "client_error",
                "code": _OWN.get(self.exit_code, "failed"),
                "param": None,
            }
            body = {"error": error, "request_id": self.request_id or None}
            sys.stderr.write(json.dumps(body, ensure_ascii=False) + "\n")
            return
        err.print("error:", style="bold red", end=" ")
        err.print(visible(self.message), markup=False)
        if self.request_id:
            err.print(f"request id {self.request_id}", style="dim", markup=False)


def from_answer(status: int | None, body: object) -> Refusal:
    """The server's error as a Refusal; without a ``status`` (in a stream) its code tells what it would have been."""
    match body:
        case {"error": {"message": str(message)} as error, **rest}:
            if status is None:
                kind = BY_CODE.get(str(error.get("code")))
                status = kind.status if kind else 500
            param = error.get("param")
            shown = f"{param}: {message}" if param else message
            return Refusal(
                shown, exit_code(status), error=error, request_id=str(rest.get("request_id") or "")
            )
    said = "an error" if status is None else f"{status}"
    return Refusal(
        f"the server answered {said}, and not in a memoryllm server's form", exit_code(status or 500)
    )


def exit_code(status: int) -> int:
    """The exit code for an HTTP status."""
    if status in (502, 503, 504):
        return UNAVAILABLE
    return FAILED if status >= 500 else REFUSED
