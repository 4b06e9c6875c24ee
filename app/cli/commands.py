"""All commands. Those of a client import neither torch nor transformers, so that they start at once."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from io import TextIOWrapper
from typing import NoReturn

import typer

from app.cli import ask, chat, keys, serve, teach, tenants, transfers
from app.cli.errors import FAILED, Refusal

app = typer.Typer(
    name="memoryllm",
    help="A model server whose users each have a memory of their own.",
    epilog="Exit codes: 0 done, 1 an answer of no, or a server that could not start, 2 wrong usage, 3 refused by the "
    "server, 4 no server or not ready, 5 the server failed, 130 interrupted. The client commands take an API key from "
    "MEMORYLLM_API_KEY. With --json an error is a JSON object in the server's form on standard error; one that no "
    "server has made has the type client_error and the code usage, refused, unavailable or failed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
serve.register(app)
teach.register(app)
ask.register(app)
chat.register(app)
transfers.register(tenants.app)
app.add_typer(tenants.app, name="tenants")
app.add_typer(keys.app, name="keys")


@app.command()
def version() -> None:
    """Print the version."""
    try:
        print(installed_version("memoryllm-serve"))
    except PackageNotFoundError:
        raise Refusal("memoryllm-serve is not installed: run from a checkout", FAILED) from None


def run(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits.

    Exit codes: 0 done, 1 an answer of no, or a server that could not start, 2 wrong usage, 3 the server refused
    the request, 4 it cannot be reached or is not ready, 5 it failed, 130 interrupted.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        # an answer in another alphabet than the terminal's is better with question marks than not at all
        sys.stdout.reconfigure(errors="replace")
    try:
        code = app(args=arguments, standalone_mode=True)
    except Refusal as refusal:
        refusal.show()
        sys.exit(refusal.exit_code)
    except OSError as error:
        # such as a full disk behind standard output
        Refusal(f"this cannot go on here: {error.strerror or error}", FAILED).show()
        sys.exit(FAILED)
    sys.exit(code)
