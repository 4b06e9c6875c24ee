"""``memoryllm tenants``: create, list, look at, fork, roll back and erase memories."""

from __future__ import annotations

import sys
from collections import defaultdict
from datetime import datetime
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from app.cli.errors import USAGE, Refusal
from app.cli.http import Answer, Api, tenant_path
from app.cli.options import DEFAULT_URL, Json, Url
from app.cli.output import err, one_line, out, print_json, working
from app.cli.teach import send_update

app = typer.Typer(help="Create, list, look at, copy, move and erase memories.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="the tenant")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="do not ask")]


@app.command("create")
def create(
    tenant: Name,
    seed: Annotated[
        int | None, typer.Option(help="decides what is forgotten; without it, drawn from the name")
    ] = None,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Make a tenant (they also come into being on first use)."""
    with Api(url, as_json=json) as api:
        answer = api.call("POST", "/tenants", {"id": tenant} | ({} if seed is None else {"seed": seed}))
        print_json(answer) if json else show_tenant(answer)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="names a page")] = 100,
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
        for name in answer["tenants"]:
            out.print(name, markup=False)
        if answer.get("next"):
            err.print(f"of {answer['total']}; more: --after {answer['next']!r}", style="dim", markup=False)


@app.command("show")
def show(tenant: Name, url: Url = DEFAULT_URL, json: Json = False) -> None:
    """One tenant: version, seed, size, and where its pool is."""
    with Api(url, as_json=json) as api:
        answer = api.call("GET", tenant_path(tenant))
        print_json(answer) if json else show_tenant(answer)


@app.command("memory")
def memory(tenant: Name, url: Url = DEFAULT_URL, json: Json = False) -> None:
    """Which updates the memory still holds, and how much of it is theirs."""
    with Api(url, as_json=json) as api:
        answer = api.call("GET", tenant_path(tenant, "/memory"))
        print_json(answer) if json else out.print(memory_table(answer))


@app.command("history")
def history(
    tenant: Name,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="updates to show")] = 20,
    before: Annotated[int | None, typer.Option(min=0, help="only updates before this version")] = None,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """The latest updates, newest first."""
    with Api(url, as_json=json) as api:
        answer = api.call("GET", tenant_path(tenant, "/history"), limit=limit, before=before)
        print_json(answer) if json else out.print(history_table(answer))


@app.command("fork")
def fork(
    tenant: Name,
    target: Annotated[str, typer.Argument(help="the new tenant, which must not exist")],
    version: Annotated[int | None, typer.Option(min=0, help="as it was then, if that is kept")] = None,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Copy a memory to a new tenant; both go on from there on their own."""
    with Api(url, as_json=json) as api:
        body = {"target": target} | ({} if version is None else {"version": version})
        with working("forking", json=json):
            answer = api.call("POST", tenant_path(tenant, "/fork"), body)
        print_json(answer) if json else show_tenant(answer)


@app.command("rollback")
def rollback(
    tenant: Name,
    version: Annotated[int, typer.Argument(min=0, help="the version to go back to")],
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Take a memory back to an earlier version; what came after it is gone for good."""
    with Api(url, as_json=json) as api:
        _confirm(yes, "rolling back", f"Take {tenant!r} back to version {version}?")
        with working("rolling back", json=json):
            answer = api.call("POST", tenant_path(tenant, "/rollback"), {"version": version})
        print_json(answer) if json else show_tenant(answer)


@app.command("rebuild")
def rebuild(
    tenant: Name,
    force: Annotated[
        bool, typer.Option("--force", help="also if the served model has written the memory")
    ] = False,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Write a memory anew from its kept texts, for the model that is served now."""
    with Api(url, as_json=json) as api:
        body, path = ({"force": True} if force else {}), tenant_path(tenant, "/rebuild")
        show = err.is_terminal and not json
        try:
            answer = send_update(api, body, show=show, path=path, what="rebuilding")
        except KeyboardInterrupt:
            err.print("a rebuild that has begun completes on the server", style="dim")
            raise
        print_json(answer) if json else show_tenant(answer)


@app.command("erase")
def erase(
    tenant: Name,
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Remove a tenant and its memory, everywhere and for good."""
    with Api(url, as_json=json) as api:
        _confirm(yes, "erasing", f"Erase {tenant!r} and all it remembers?")
        with working("erasing", json=json):
            answer = api.call("DELETE", tenant_path(tenant))
        print_json(answer) if json else show_tenant(answer)


def _confirm(yes: bool, what: str, question: str) -> None:
    """Asks, unless told not to; where nobody can answer, --yes is needed. Raises Refusal, typer.Abort."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refusal(f"{what} cannot be undone: say --yes", USAGE)
    typer.confirm(question, abort=True, err=True)


def memory_table(answer: Answer) -> Table:
    """Each update's share of the pool, newest first; a range where layers differ."""
    shares: dict[int, list[float]] = defaultdict(list)
    layers = answer["layers"]
    for layer in layers:
        for item in layer["versions"]:
            shares[item["version"]].append(item["share"])
    table = Table("version", "updates ago", "of the memory", box=None, pad_edge=False)
    for version in sorted(shares, reverse=True):
        found = shares[version]
        least = min(found) if len(found) == len(layers) else 0.0
        mean = f"{sum(found) / len(layers):.1%}"
        spread = f" ({least:.1%} to {max(found):.1%} by layer)" if least != max(found) else ""
        name = str(version) if version else "0, the model's own"
        table.add_row(name, str(answer["memory_version"] - version), mean + spread)
    return table


def history_table(answer: Answer) -> Table:
    """The updates with their texts, each on one line."""
    table = Table("version", "time", "tokens", "left", "text", box=None, pad_edge=False)
    for item in answer["updates"]:
        text = Text(one_line(item["text"] or "", 60), overflow="ellipsis", no_wrap=True)
        left = f"{item['surviving_share']:.0%}"
        table.add_row(str(item["memory_version"]), _when(item["time"]), str(item["tokens"]), left, text)
    return table


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def show_tenant(answer: Answer) -> None:
    """What the server tells of a tenant, a line a field."""
    for name, value in answer.items():
        if name in ("created", "updated"):
            value = _when(value)
        elif name in ("bytes", "blobs"):
            value = f"{value:,}"
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        elif isinstance(value, dict):
            found = [f"{limit:,} {kind.replace('_', ' ')}" for kind, limit in value.items() if limit]
            value = ", ".join(found) or "none"
        out.print(f"{name.replace('_', ' '):16}{value}", markup=False)
