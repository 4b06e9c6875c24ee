"""``memoryllm update``: tell a memory something."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from app.cli.errors import USAGE, Refusal
from app.cli.http import Answer, Api
from app.cli.options import DEFAULT_TENANT, DEFAULT_URL, Json, Tenant, Url, file_text, text_of
from app.cli.output import err, out, print_json

Short = Annotated[
    Literal["refuse", "repeat", "fill"],
    typer.Option(
        help="what to do with a text below the model's shortest context (fill: or shorter than a block)"
    ),
]


def send_update(
    api: Api, body: dict[str, Any], *, show: bool, path: str = "/update", what: str = "remembering"
) -> Answer:
    """The final answer of an update or a rebuild; a progress bar over blocks if ``show``.

    Always streamed: the server's keep-alives carry an hour's update through proxies and time limits.
    """
    answer = Answer()
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
        bar = progress.add_task(what, total=None)
        for event in api.stream(path, body):
            answer = event.data
            if event.name == "progress":
                progress.update(bar, completed=answer["done"], total=answer["total"])
    return answer


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
    with Api(url, as_json=json) as api:
        if file is not None and text is None:
            content = file_text(file)
        elif text is not None and file is None:
            content = text_of(text)
        else:
            raise Refusal("give either a text, - for standard input, or --file", USAGE)
        body: dict[str, Any] = {"tenant": tenant, "text": content, "short": short}
        if idempotency_key is not None:
            body["idempotency_key"] = idempotency_key
        try:
            answer = send_update(api, body, show=err.is_terminal and not json)
        except KeyboardInterrupt:
            err.print("an update that has begun completes on the server", style="dim")
            raise
        if json:
            print_json(answer)
        else:
            out.print(told(answer, tenant), markup=False)


def told(answer: Answer, tenant: str) -> str:
    """An update's answer in a sentence."""
    if answer.get("replayed"):
        return f"this key's update was done before; {tenant!r} is at version {answer['memory_version']}"
    blocks = answer["blocks"]
    again = ", the text repeated to fill a block" if answer.get("short") == "repeated" else ""
    return (
        f"remembered {answer['tokens']} tokens in {blocks} block{'s' if blocks != 1 else ''}{again}; "
        f"{tenant!r} is at version {answer['memory_version']}"
    )


def register(app: typer.Typer) -> None:
    app.command()(update)
