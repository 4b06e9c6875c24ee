"""``memoryllm serve``: an option for every field of Settings; flag over environment over default."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from app.cli.errors import Refusal
from app.settings import Settings

USAGE = 2


def _help(name: str) -> str:
    field = Settings.model_fields[name]
    default = "" if field.default in (PydanticUndefined, None) else f"; default {field.default}"
    return f"{field.description or name}{default} (MEMORYLLM_{name.upper()})"


def _parameters() -> list[inspect.Parameter]:
    """One option a field, as text: the settings themselves know how to read it."""
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(
                    f"--{name.replace('_', '-')}", help=_help(name), metavar="VALUE", show_default=False
                ),
            ],
        )
        for name in Settings.model_fields
    ]


def read_settings(given: dict[str, Any]) -> Settings:
    """Raises Refusal with one line a wrong value."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_input=False, include_url=False):
            name = ".".join(str(part) for part in problem["loc"]) or "settings"
            lines.append(f"{name.replace('_', '-')}: {problem['msg']}")
        raise Refusal("; ".join(lines), USAGE) from error


def serve(**given: Any) -> None:
    """Start a server: the HTTP interface and one worker, until it is told to stop."""
    settings = read_settings(given)
    # imported here: the client commands need none of it
    from app.api.server import run_server

    raise typer.Exit(run_server(settings))


def register(app: typer.Typer) -> None:
    """Adds the command, with a signature made from the settings."""
    serve.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
    app.command()(serve)
