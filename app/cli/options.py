"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Url = Annotated[
    str, typer.Option("--url", envvar="MEMORYLLM_URL", help="the server's address", show_default=True)
]
Tenant = Annotated[
    str, typer.Option("--tenant", "-t", envvar="MEMORYLLM_TENANT", help="whose memory", show_default=True)
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document, for scripts")]
DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TENANT = "default"
