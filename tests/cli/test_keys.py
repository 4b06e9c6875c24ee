"""``memoryllm keys``: keys are shown once, listed without themselves, and revoked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.cli.http import KEY_VARIABLE, Api
from app.cli.output import out
from app.keys.file import read
from tests.cli.conftest import Run


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "keys.json"
    monkeypatch.setenv("MEMORYLLM_KEYS_FILE", str(path))
    return path


def test_a_key_is_made_shown_once_listed_and_revoked(run: Run, file: Path) -> None:
    made = run(
        "keys", "create", "--tenant", "ada", "--tenant", "team/*", "--name", "a note", "--max-bytes", "2MiB"
    )
    assert made.code == 0
    key = made.out.strip()
    (entry,) = read(file).keys
    assert read(file).find(key) == entry
    assert entry.tenants == ("ada", "team/*")
    assert entry.limits.bytes == 2 * 2**20
    listed = run("keys", "list")
    assert entry.id in listed.out
    assert "ada, team/*" in listed.out
    assert key not in listed.out + listed.err
    assert entry.digest not in listed.out
    shown = json.loads(run("keys", "list", "--json").out)
    assert shown["keys"][0]["name"] == "a note"
    assert "digest" not in shown["keys"][0]
    assert run("keys", "revoke", entry.id).code == 0
    assert read(file).find(key) is None
    assert run("keys", "revoke", entry.id).code == 3


def test_a_narrow_terminal_shows_the_whole_id(run: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out, "width", 60)
    limits = ["--updates-per-day", "2000", "--max-bytes", "2MiB", "--concurrent", "100"]
    assert run("keys", "create", "--tenant", "x" * 40, "--name", "y" * 40, *limits).code == 0
    assert read(file).keys[0].id in run("keys", "list").out


def test_json_for_scripts(run: Run, file: Path) -> None:
    made = json.loads(run("keys", "create", "--admin", "--json").out)
    entry = read(file).find(made["key"])
    assert entry is not None
    assert entry.admin
    assert entry.id == made["id"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["create"],
        ["create", "--admin", "--tenant", "ada"],
        ["create", "--tenant", "*"],
        ["create", "--tenant", "ada", "--max-bytes", "lots"],
        ["create", "--tenant", "ada", "--concurrent", "-1"],
        ["create", "--tenant", "ada", "--concurrent", str(2**70)],
        ["create", "--tenant", "ada", "--max-bytes", str(2**63)],
        ["create", "--tenant", "ada", "--tenant", "a" * 1000],
        ["create", "--tenant", "ada\udcff"],
        ["create", "--tenant", "."],
        ["create", "--tenant", "ada", "--name", "two\nlines"],
        ["create", "--tenant", "ada", "--name", "\udcff"],
    ],
)
def test_wrong_usage(run: Run, file: Path, arguments: list[str]) -> None:
    assert run("keys", *arguments).code == 2
    assert not file.exists()


def test_a_damaged_file_is_left_alone(run: Run, file: Path) -> None:
    file.write_text("{")
    file.chmod(0o600)
    assert run("keys", "create", "--admin").code == 2
    assert run("keys", "list").code == 2
    assert file.read_text() == "{"


def test_client_commands_send_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with Api("http://127.0.0.1:1") as api:
        assert "authorization" not in api._http.headers
    monkeypatch.setenv(KEY_VARIABLE, " mllm-1 ")
    with Api("http://127.0.0.1:1") as api:
        assert api._http.headers["authorization"] == "Bearer mllm-1"


def test_errors_are_json_for_scripts_too(run: Run, file: Path) -> None:
    wrong = [
        ("create", "--admin", "--max-bytes", "foo"),
        ("create", "--admin", "--file", str(file / "none" / "keys.json")),
        ("revoke", "0" * 12),
    ]
    for words in wrong:
        ran = run("keys", *words, "--json")
        assert ran.code in (2, 3)
        assert json.loads(ran.err)["error"]["message"]
    made = json.loads(run("keys", "create", "--admin", "--json").out)
    assert json.loads(run("keys", "revoke", made["id"], "--json").out) == {"id": made["id"]}
    assert read(file).keys == ()
