"""``memoryllm serve``: an option for every field of Settings; flag over environment over default."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from app.cli.errors import NOT_STARTED, USAGE, Refusal
from app.settings import Settings

_MIB = 2**20
# its disk and its memory are asked in ways that other systems do not have
_CAN_SERVE = sys.platform == "linux"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _variable(name: str) -> str:
    return f"MEMORYLLM_{name.upper()}"


def _help(name: str) -> str:
    field = Settings.model_fields[name]
    default: Any = field.default
    if name.endswith("_bytes") and default and default % _MIB == 0:
        default = f"{default // _MIB}MiB"
    known = "" if default in (PydanticUndefined, None, ()) else f"; default {str(default).lower()}"
    return f"{field.description or name.replace('_', ' ')}{known} ({_variable(name)})"


def _parameter(name: str) -> inspect.Parameter:
    """One option, as text: the settings themselves know how to read it."""
    kind = Settings.model_fields[name].annotation
    if kind is bool:
        annotation: Any = Annotated[
            bool | None, typer.Option(f"{_flag(name)}/--no-{_flag(name)[2:]}", help=_help(name))
        ]
    else:
        choices = "|".join(word for word in get_args(kind) if isinstance(word, str))
        annotation = Annotated[
            list[str] | None if get_origin(kind) is tuple else str | None,
            typer.Option(_flag(name), help=_help(name), metavar=choices or "VALUE", show_default=False),
        ]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def read_settings(flags: dict[str, Any]) -> Settings:
    """Settings from the flags that were given, the environment and the defaults, in this order.

    Raises Refusal with one line that names each wrong flag or variable.
    """
    # a list that was not given is empty
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    try:
        return Settings(**given)
    except ValidationError as error:
        faults = []
        for problem in error.errors(include_input=False, include_url=False):
            name = str(problem["loc"][0]) if problem["loc"] else "settings"
            reason = problem["msg"].removeprefix("Value error, ")
            faults.append(
                f"{_flag(name) if name in given else _variable(name)}: {reason[:1].lower()}{reason[1:]}"
            )
        raise Refusal("; ".join(faults), USAGE) from error
    except RuntimeError as error:
        raise Refusal(f"no place for memories ({error}): give --store", USAGE) from error


def serve(**flags: Any) -> None:
    """Start a server: the HTTP interface and one worker, until it is told to stop.

    Each option is also an environment variable. Sizes take units (4GiB), durations are seconds.
    """
    if not _CAN_SERVE:
        raise Refusal(f"a server runs on Linux only, and this is {sys.platform}", NOT_STARTED)
    settings = read_settings(flags)
    # imported here: the client commands need none of it
    from app.api.server import run_server

    raise typer.Exit(run_server(settings))


def register(app: typer.Typer) -> None:
    """Adds the command, with a signature made from the settings."""
    serve.__signature__ = inspect.Signature([_parameter(name) for name in Settings.model_fields])  # type: ignore[attr-defined]
    app.command()(serve)
