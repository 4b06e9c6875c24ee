"""What ends a command early, and the exit code that says why."""

from __future__ import annotations

import json
import sys

from app.cli.output import err

REFUSED, UNAVAILABLE, FAILED = 3, 4, 5


class Refusal(Exception):
    """An error to show to the user. ``as_json`` prints it for scripts."""

    def __init__(
        self,
        message: str,
        exit_code: int,
        *,
        code: str = "error",
        request_id: str | None = None,
        as_json: bool = False,
    ) -> None:
        super().__init__(message)
        self.message, self.exit_code, self.code, self.request_id = message, exit_code, code, request_id
        self.as_json = as_json

    def show(self) -> None:
        if self.as_json:
            body = {"error": {"message": self.message, "code": self.code}, "request_id": self.request_id}
            sys.stderr.write(json.dumps(body, ensure_ascii=False) + "\n")
            return
        err.print("error:", style="bold red", end=" ")
        err.print(self.message, markup=False)
        if self.request_id:
            err.print(f"request id {self.request_id}", style="dim", markup=False)


def exit_code(status: int) -> int:
    """The exit code for an HTTP status."""
    if status in (502, 503, 504):
        return UNAVAILABLE
    return FAILED if status >= 500 else REFUSED
