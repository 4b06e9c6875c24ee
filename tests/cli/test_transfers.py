"""``memoryllm tenants export`` and ``import``: whole files or none."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path

import pytest

from tests.cli.conftest import Fake, Reply, Run, Start
from tests.cli.test_tenants import TENANT

MEMORY = bytes(range(256)) * 9000
OCTETS = "application/octet-stream"


@pytest.fixture
def offered(fake: Fake) -> Fake:
    fake.reply("/tenants/a%2Fb/export", Reply(kind=OCTETS, body=MEMORY))
    return fake


def test_export(offered: Fake, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "ada.safetensors"
    ran = run("tenants", "export", "a/b", str(file))
    assert (ran.code, file.read_bytes()) == (0, MEMORY)
    assert "2,304,000 bytes" in ran.out
    assert file.stat().st_mode & 0o777 == 0o600
    assert run("tenants", "export", "a/b", str(file), "--texts", "--force").code == 0
    assert [path for _, path, _ in offered.seen] == [
        "/tenants/a%2Fb/export",
        "/tenants/a%2Fb/export?texts=true",
    ]
    told = json.loads(run("tenants", "export", "a/b", str(file), "-f", "--json").out)
    assert told == {"tenant": "a/b", "memory_version": 0, "bytes": len(MEMORY), "file": str(file)}
    assert list(tmp_path.iterdir()) == [file]


def test_an_existing_file_is_not_replaced_unasked(offered: Fake, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "ada.safetensors"
    file.write_bytes(b"mine")
    ran = run("tenants", "export", "a/b", str(file))
    assert (ran.code, file.read_bytes(), offered.seen) == (2, b"mine", [])
    assert "--force" in ran.err
    assert run("tenants", "export", "a/b", str(tmp_path), "--force").code == 2
    assert run("tenants", "export", "a/b", str(tmp_path / "no" / "such")).code == 2


def test_a_file_that_breaks_off_is_none(offered: Fake, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "ada.safetensors"
    file.write_bytes(b"old")
    offered.reply("/tenants/a%2Fb/export", Reply(kind=OCTETS, body=MEMORY, length=len(MEMORY) + 1))
    assert run("tenants", "export", "a/b", str(file), "--force").code == 4
    error = {"error": {"message": "no such", "type": "not_found_error", "code": "tenant_not_found"}}
    offered.answer("/tenants/a%2Fb/export", error, 404)
    assert run("tenants", "export", "a/b", str(file), "--force").code == 3
    assert run("tenants", "export", "a/b", str(file), "--force", url="http://127.0.0.1:1").code == 4
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_ctrl_c_leaves_no_file(offered: Fake, start: Start, tmp_path: Path) -> None:
    offered.reply("/tenants/a%2Fb/export", Reply(kind=OCTETS, body=MEMORY, open_end=True))
    file = tmp_path / "ada.safetensors"
    process = start("tenants", "export", "a/b", str(file))

    def begun() -> bool:
        return any(path.stat().st_size for path in tmp_path.iterdir())

    for _ in range(2000):
        if begun():
            break
        offered.client_left.wait(0.01)
    assert begun()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_export_to_a_pipe(offered: Fake, start: Start) -> None:
    process = start("tenants", "export", "a/b", "-")
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, MEMORY)


def test_import(fake: Fake, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ada.safetensors"
    file.write_bytes(MEMORY)
    fake.answer("/tenants/new%20one/import", TENANT, 201)
    assert "12,345" in run("tenants", "import", "new one", str(file)).out
    assert fake.bodies == [MEMORY]
    assert json.loads(run("tenants", "import", "new one", "-", "--json", stdin=MEMORY).out) == TENANT
    assert fake.bodies == [MEMORY, MEMORY]
    error = {
        "error": {"message": "no memory", "type": "invalid_request_error", "code": "invalid_memory_file"}
    }
    fake.answer("/tenants/bad/import", error, 422)
    ran = run("tenants", "import", "bad", str(file))
    assert (ran.code, ran.out) == (3, "")
    assert run("tenants", "import", "bad", str(tmp_path / "none")).code == 2

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    # a memory is neither shown on nor typed into a terminal
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", Terminal())
        assert run("tenants", "export", "bad", "-").code == 2
