"""Exit codes and messages: refusals, servers that fail, servers that are none."""

from __future__ import annotations

import json
import re
import socket
from importlib.metadata import PackageNotFoundError

import pytest

from app.cli.errors import FAILED, REFUSED, UNAVAILABLE, USAGE
from tests.cli.conftest import Fake, Reply, Run

COMMANDS = [
    ["update", "x"],
    ["generate", "x"],
    ["generate", "x", "--stream"],
    ["score", "a", "b"],
    ["tenants", "list"],
    ["tenants", "show", "ada"],
    ["tenants", "memory", "ada"],
    ["tenants", "history", "ada"],
    ["tenants", "create", "ada"],
    ["tenants", "erase", "ada", "-y"],
]
PATHS = [
    "/update",
    "/generate",
    "/score",
    "/tenants",
    "/tenants/ada",
    "/tenants/ada/memory",
    "/tenants/ada/history",
]


@pytest.mark.parametrize(
    ("status", "code"), [(400, 3), (404, 3), (422, 3), (429, 3), (503, 4), (504, 4), (500, 5), (507, 5)]
)
def test_statuses_become_exit_codes(fake: Fake, run: Run, status: int, code: int) -> None:
    for path in ("/generate", "/update"):
        fake.answer(path, {"error": {"message": "wrong"}, "request_id": "r1"}, status)
    assert run("generate", "x").code == code
    assert run("update", "x").code == code


def test_the_servers_message_and_request_id_are_shown(fake: Fake, run: Run) -> None:
    error = {"message": "it [b]went wrong\x07", "type": "t", "code": "why", "param": "text"}
    for path in PATHS:
        fake.answer(path, {"error": error, "request_id": "r1"}, 409)
    for command in COMMANDS:
        ran = run(*command)
        assert (ran.code, ran.out) == (3, ""), command
        assert ran.err == "error: text: it [b]went wrong\\x07\nrequest id r1\n"
        ran = run(*command, "--json")
        assert (ran.code, ran.out) == (3, ""), command
        assert json.loads(ran.err) == {"error": error, "request_id": "r1"}


@pytest.mark.parametrize(("named", "code"), [("worker_unavailable", 4), ("tenant_erased", 3), ("new_one", 5)])
def test_an_error_in_a_stream_counts_as_its_status_would(fake: Fake, run: Run, named: str, code: int) -> None:
    gone = ("error", {"error": {"message": "gone", "code": named}, "request_id": "r1"})
    fake.events("/generate", (None, {"text": "Tar"}), gone)
    ran = run("generate", "x", "--stream")
    assert (ran.code, ran.out) == (code, "Tar\n")
    assert "gone" in ran.err
    fake.events("/update", ("progress", {"done": 1, "total": 2}), gone)
    assert run("update", "x").code == code


BROKEN = {
    "no JSON": (Reply(body=b"<html>"), 5),
    "not an object": (Reply(body=b"[1]"), 5),
    "an empty object": (Reply(), 5),
    "no bytes": (Reply(body=b""), 5),
    "not UTF-8": (Reply(body=b"\xff\xfe"), 5),
    "nested too deep": (Reply(body=b"[" * 100_000), 5),
    "a redirect": (Reply(302), 5),
    "an error page": (Reply(404, "text/html", b"<html>"), 3),
    "a proxy's error page": (Reply(502, "text/html", b"<html>"), 4),
    "an error of another shape": (Reply(500, body=b'{"error": "bad"}'), 5),
    "a body cut short": (Reply(body=b'{"te', length=100), 4),
    "no HTTP": (Reply(raw=b"220 smtp\r\n"), 4),
    "nothing": (Reply(raw=b""), 4),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_answers_are_named_not_traced(fake: Fake, run: Run, name: str) -> None:
    reply, code = BROKEN[name]
    for path in PATHS:
        fake.reply(path, reply)
    for command in COMMANDS[:5]:
        ran = run(*command)
        assert (ran.code, ran.out) == (code, ""), (command, ran.err)
        assert ran.err.startswith("error: ")


def test_a_stream_that_breaks_off_is_no_answer(fake: Fake, run: Run) -> None:
    fake.events("/generate", (None, {"text": "Tar"}))
    ran = run("generate", "x", "--stream")
    assert (ran.code, ran.out) == (5, "Tar\n")
    assert "broke off" in ran.err
    fake.events("/update", ("progress", {"done": 1, "total": 2}))
    assert run("update", "x").code == 5
    for data in ("{", "[]", "7", '{"no": "text"}'):
        fake.events("/generate", (None, data), (None, "[DONE]"))
        assert run("generate", "x", "--stream").code == 5


def test_a_server_that_is_not_there(run: Run) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        ran = run("tenants", "list", url=url)
        told = run("tenants", "list", "--json", url=url)
    assert ran.code == told.code == 4
    assert json.loads(told.err)["error"]["code"] == "unavailable"
    assert "memoryllm serve" in ran.err


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://host", "http://", "http://[", "http://a:port", "x\x00"]
)
def test_an_address_that_is_none(run: Run, url: str) -> None:
    ran = run("generate", "x", "--url", url)
    assert ran.code == 2
    assert "no address" in ran.err
    error = json.loads(run("generate", "x", "--json", "--url", url).err)["error"]
    assert (error["type"], error["code"]) == ("client_error", "usage")


def test_the_help_names_every_exit_code(run: Run) -> None:
    told = re.sub(r"[\s│]+", " ", run("--help").out)
    for code in (0, 1, USAGE, REFUSED, UNAVAILABLE, FAILED, 130):
        assert re.search(rf"[ ,]{code} [a-z]", told.split("Exit codes:")[1]), code


def test_usage_errors(run: Run, fake: Fake) -> None:
    for arguments in (
        ["nonsense"],
        ["generate"],
        ["generate", "x", "--top-k", "many"],
        ["tenants", "nonsense"],
    ):
        assert run(*arguments).code == 2
    assert fake.seen == []


def test_the_version_is_the_installed_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.cli.commands.installed_version", lambda name: f"1.2.3 of {name}")
    assert run("version").out == "1.2.3 of memoryllm-serve\n"

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("app.cli.commands.installed_version", missing)
    ran = run("version")
    assert (ran.code, ran.out) == (5, "")
