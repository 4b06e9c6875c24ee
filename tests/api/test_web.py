"""The web server as it is put together: what its protocol refuses is counted and told like any other error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app import logs
from app.api.protocol import Protocol
from app.api.spool import Spool
from app.api.web import web_server
from app.api.worker import WorkerClient
from app.errors import HeadersTooLarge
from app.settings import Settings


def test_what_comes_before_all_middleware_is_counted_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, settings = WorkerClient(), Settings(store="disk:///nowhere")
    server = web_server(settings, client, Spool(tmp_path, 1), None, loopback=False, last_seconds=1)
    server.config.load()
    protocol = server.config.http_protocol_class
    assert issubclass(protocol, Protocol)
    logs.configure(Settings(log_level="info", log_json=True))
    try:
        protocol.refused(HeadersTooLarge("too many"), "a7")
    finally:
        logs.configure(Settings(log_level="error"))
    assert 'memoryllm_http_errors_total{code="headers_too_large"} 1.0' in client.metrics.render().decode()
    line = json.loads(capsys.readouterr().err)
    assert (line["request_id"], line["code"], line["status"]) == ("a7", "headers_too_large", 431)
