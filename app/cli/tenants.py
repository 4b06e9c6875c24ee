"""``memoryllm tenants``: create, list, look at and erase memories."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from app.cli.errors import Refusal
from app.cli.http import Api, tenant_path
from app.cli.options import DEFAULT_URL, Json, Url
from app.cli.output import err, out, print_json

app = typer.Typer(help="Create, list, look at and erase memories.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="the tenant")]


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _show(answer: dict[str, Any]) -> None:
    for name, value in answer.items():
        shown = _when(value) if name in ("created", "updated") and value else value
        out.print(f"{name:16} {shown}", markup=False)


@app.command("create")
def create(
    tenant: Name,
    seed: Annotated[int | None, typer.Option(help="what its forgetting is drawn from, below 2^40")] = None,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Make a tenant (they also come into being on first use)."""
    with Api(url, as_json=json) as api:
        answer = api.call("POST", "/tenants", {"id": tenant} | ({} if seed is None else {"seed": seed}))
    print_json(answer) if json else _show(answer)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(help="names a page")] = 100,
    after: Annotated[str | None, typer.Option(help="start behind this name")] = None,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Names of tenants, in order."""
    with Api(url, as_json=json) as api:
        answer = api.call("GET", "/tenants", limit=limit, after=after)
    if json:
        print_json(answer)
        return
    for item in answer["tenants"]:
        out.print(item if isinstance(item, str) else item["id"], markup=False)
    if answer.get("next"):
        err.print("more: --after", answer["next"], style="dim", markup=False)


@app.command("show")
def show(tenant: Name, url: Url = DEFAULT_URL, json: Json = False) -> None:
    """One tenant: version, seed, size."""
    with Api(url, as_json=json) as api:
        answer = api.call("GET", tenant_path(tenant))
    print_json(answer) if json else _show(answer)


@app.command("memory")
def memory(tenant: Name, url: Url = DEFAULT_URL, json: Json = False) -> None:
    """Which updates the memory still holds, and how much of each."""
    with Api(url, as_json=json) as api:
        answer = api.call("GET", tenant_path(tenant, "/memory"))
    print_json(answer) if json else _show(answer)


@app.command("history")
def history(
    tenant: Name,
    limit: Annotated[int, typer.Option(help="updates to show")] = 20,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """The latest updates, newest first."""
    with Api(url, as_json=json) as api:
        answer = api.call("GET", tenant_path(tenant, "/history"), limit=limit)
    if json:
        print_json(answer)
        return
    table = Table("version", "time", "tokens", "left", "text")
    for item in answer["updates"]:
        text = " ".join((item["text"] or "").split())
        table.add_row(
            str(item["memory_version"]),
            _when(item["time"]),
            str(item["tokens"]),
            f"{item['surviving_share']:.0%}",
            text if len(text) <= 60 else text[:59] + "…",
        )
    out.print(table)


@app.command("erase")
def erase(
    tenant: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Remove a tenant and its memory, everywhere and for good."""
    if not yes:
        if not sys.stdin.isatty():
            raise Refusal("erasing cannot be undone: say --yes", 2, as_json=json)
        typer.confirm(f"Erase {tenant!r} and all it remembers?", abort=True, err=True)
    with Api(url, as_json=json) as api:
        answer = api.call("DELETE", tenant_path(tenant))
    print_json(answer) if json else _show(answer)
