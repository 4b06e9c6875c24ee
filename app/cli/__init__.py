"""The ``memoryllm`` command. What it consists of is in ``commands``."""

from __future__ import annotations

import sys
from typing import NoReturn

from app import headstart


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits, see ``commands.run``."""
    # before anything is imported: a server is ready when its worker is
    serves = arguments is None and sys.argv[1:2] == ["serve"] and "--help" not in sys.argv
    if serves and sys.platform == "linux":
        headstart.begin()
    from app.cli.commands import run

    run(arguments)
