"""``memoryllm update``: tell a memory something."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from app.cli.errors import FAILED, Refusal
from app.cli.http import Api
from app.cli.options import DEFAULT_TENANT, DEFAULT_URL, Json, Tenant, Url
from app.cli.output import err, out, print_json

Short = Annotated[str, typer.Option(help="a text below the model's shortest context: refuse, or repeat it")]


def _text(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise Refusal("give either a text, - for standard input, or --file", 2)
    if file is not None:
        try:
            return file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Refusal(f"{file} cannot be read as UTF-8 text: {error}", 2) from error
    assert text is not None
    return sys.stdin.read() if text == "-" else text


def send_update(api: Api, body: dict[str, Any], *, show: bool) -> dict[str, Any]:
    """Updates with a progress bar over blocks if ``show``; the final answer."""
    with Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("blocks"),
        TimeRemainingColumn(),
        console=err,
        disable=not show,
        transient=True,
    ) as progress:
        bar = progress.add_task("remembering", total=None)
        for event in api.stream("/update", body | {"stream": True}):
            if event.name == "done":
                answer: dict[str, Any] = event.data
                return answer
            progress.update(bar, completed=event.data.get("done"), total=event.data.get("total"))
    raise Refusal("the server ended the update without an answer", FAILED, as_json=api.as_json)


def update(
    text: Annotated[str | None, typer.Argument(help="what to remember; - reads standard input")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="a UTF-8 text file instead")] = None,
    tenant: Tenant = DEFAULT_TENANT,
    idempotency_key: Annotated[
        str | None, typer.Option(help="a retry with the same key changes nothing")
    ] = None,
    short: Short = "refuse",
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Put a text into a tenant's memory; returns when it is durable."""
    body: dict[str, Any] = {"tenant": tenant, "text": _text(text, file), "short": short}
    if idempotency_key is not None:
        body["idempotency_key"] = idempotency_key
    with Api(url, as_json=json) as api:
        answer = send_update(api, body, show=err.is_terminal and not json)
    if json:
        print_json(answer)
        return
    blocks = answer["blocks"]
    out.print(
        f"remembered {answer['tokens']} tokens in {blocks} block{'s' if blocks != 1 else ''}; "
        f"{tenant!r} is at version {answer['memory_version']}",
        markup=False,
    )


def register(app: typer.Typer) -> None:
    app.command()(update)
