"""The ``memoryllm`` command. Client commands import neither torch nor transformers, so that they start at once."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from typing import Any

import typer

from app.cli import ask, serve, teach, tenants
from app.cli.errors import Refusal
from app.cli.output import err

app = typer.Typer(
    name="memoryllm",
    help="A model server whose users each have a memory of their own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
serve.register(app)
teach.register(app)
ask.register(app)
app.add_typer(tenants.app, name="tenants")


@app.command()
def version() -> None:
    """Print the version."""
    print(installed_version("memoryllm-serve"))


def main(arguments: list[str] | None = None) -> Any:
    """Runs the command line and exits.

    Exit codes: 0 done, 2 wrong usage, 3 the server refused the request, 4 it cannot be reached or is not
    ready, 5 it failed, 130 interrupted.
    """
    try:
        code = app(args=arguments, standalone_mode=True)
    except Refusal as refusal:
        refusal.show()
        sys.exit(refusal.exit_code)
    except KeyboardInterrupt:
        err.print()
        sys.exit(130)
    except BrokenPipeError:
        # whoever read our output has gone
        sys.stderr.close()
        sys.exit(0)
    sys.exit(code)
