"""Memories as things against a real server with the pocket model: forked, taken back, moved, and erased."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file

from tests.server.process import ServerProcess, until
from tests.server.test_pocket import ask

POCKET = Path(__file__).parents[2] / "app" / "pocket"
OCTETS = {"content-type": "application/octet-stream"}
DOG = "What is my dog called?"


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spool")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, spool: Path) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("pocket") / "store"
    with ServerProcess(store, model="pocket", spool_dir=spool) as running:
        yield running


def files(spool: Path) -> list[Path]:
    return [path for path in spool.glob("*/*") if path.name != "lock"]


def test_a_memory_is_forked_and_taken_back(server: ServerProcess) -> None:
    server.update("ada", "My dog is called Rex.")
    server.update("ada", "Mira Tolvan lives in Tarnovik.")
    assert server.post("/tenants/ada/fork", target="then", version=1).status_code == 201
    assert server.post("/tenants/ada/fork", target="now").status_code == 201
    assert server.post("/tenants/ada/rollback", version=0).json()["lineage"] == 1
    assert ask(server, "ada", DOG) != "Rex"
    assert ask(server, "then", DOG) == ask(server, "now", DOG) == "Rex"
    server.update("ada", "My dog is called Bruno.")
    assert ask(server, "ada", DOG) == "Bruno"
    assert ask(server, "then", DOG) == "Rex"
    assert [server.version(name) for name in ("ada", "then", "now")] == [1, 1, 2]


def test_a_memory_of_the_served_model_needs_no_texts_to_be_left_alone(server: ServerProcess) -> None:
    server.update("fay", list(range(20, 60)))
    answer = server.post("/tenants/fay/rebuild")
    assert (answer.status_code, answer.json()["rebuilt"]) == (200, False)
    forced = server.post("/tenants/fay/rebuild", force=True)
    assert (forced.status_code, forced.json()["error"]["code"]) == (409, "texts_not_kept")
    assert server.version("fay") == 1


def test_a_memory_moves_as_a_file(server: ServerProcess, spool: Path, tmp_path: Path) -> None:
    for text in ("My dog is called Rex.", "Mira Tolvan lives in Tarnovik."):
        server.update("bob", text)
    file = tmp_path / "bob.safetensors"
    with server.http.stream("GET", "/tenants/bob/export?texts=true") as answer:
        assert answer.status_code == 200
        file.write_bytes(answer.read())
    assert set(load_file(file)) == {"memory", "born", "initialized"}
    history = server.http.get("/tenants/bob/history").json()["updates"]
    assert server.http.delete("/tenants/bob").json()["erased"]
    made = server.http.post("/tenants/eve/import", content=file.read_bytes(), headers=OCTETS)
    assert made.status_code == 201, made.text
    assert made.json()["memory_version"] == 2
    assert ask(server, "eve", DOG) == "Rex"
    assert server.http.get("/tenants/eve/history").json()["updates"] == history
    again = server.http.post("/tenants/eve/import", content=file.read_bytes(), headers=OCTETS)
    assert again.status_code == 409
    damaged = bytearray(file.read_bytes())
    # the memory's first number becomes a NaN
    length = int.from_bytes(damaged[:8], "little")
    damaged[8 + length + 2 : 8 + length + 4] = b"\xff\x7f"
    refused = server.http.post("/tenants/mal/import", content=bytes(damaged), headers=OCTETS)
    assert refused.json()["error"]["code"] == "invalid_memory_file"
    assert server.http.get("/tenants/mal").status_code == 404
    assert files(spool) == []


def test_a_client_that_leaves_in_the_middle_leaves_nothing(server: ServerProcess, spool: Path) -> None:
    server.update("carl", "My dog is called Rex.")

    def pieces() -> Iterator[bytes]:
        yield bytes(1 << 20)
        until(lambda: bool(files(spool)), "a file in the spool")
        raise RuntimeError("the client breaks off")

    with httpx.Client(base_url=server.url, trust_env=False) as leaving:
        with pytest.raises(RuntimeError, match="breaks off"):
            leaving.post("/tenants/mal/import", content=pieces(), headers=OCTETS)
        with leaving.stream("GET", "/tenants/carl/export") as answer:
            next(answer.iter_raw(1000))
    until(lambda: not files(spool), "the spool to be empty")
    assert server.http.get("/tenants/mal").status_code == 404
    assert ask(server, "carl", DOG) == "Rex"


def test_a_killed_server_leaves_no_half_import_and_its_files_are_removed(tmp_path: Path) -> None:
    store, spool = tmp_path / "store", tmp_path / "spool"
    held = threading.Event()
    with ServerProcess(store, model="pocket", spool_dir=spool) as server:
        server.update("ada", "My dog is called Rex.")

        def pieces() -> Iterator[bytes]:
            yield bytes(1 << 20)
            held.wait(60)

        def send() -> None:
            cut = pytest.raises(httpx.TransportError)
            with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as http, cut:
                http.post("/tenants/mal/import", content=pieces(), headers=OCTETS)

        sending = threading.Thread(target=send)
        sending.start()
        until(lambda: bool(files(spool)), "a file in the spool")
        worker = server.worker_pid
        server.kill()
        held.set()
        sending.join()
    until(lambda: not Path(f"/proc/{worker}").exists(), "the worker to end with its server")
    (left,) = spool.iterdir()
    with ServerProcess(store, model="pocket", spool_dir=spool) as server:
        assert not left.exists()
        assert server.http.get("/tenants").json()["tenants"] == ["ada"]
        assert ask(server, "ada", DOG) == "Rex"


def test_another_model_takes_over_the_store(tmp_path: Path) -> None:
    """Killed in the middle of a rebuild, the server finds the old memory again, and then rebuilds it whole."""
    store, model = tmp_path / "store", tmp_path / "model"
    shutil.copytree(POCKET, model)
    with ServerProcess(store, model="pocket") as server:
        server.update("ada", "My dog is called Rex.", idempotency_key="dog")
        for number in range(40):
            server.update("ada", f"Mira Tolvan was seen in Tarnovik {number} times.")
        expected, told = ask(server, "ada", DOG), server.http.get("/tenants/ada/memory").json()
        assert server.post("/tenants/ada/rebuild", force=False).json()["rebuilt"] is False
    # the same weights under another configuration: to the store it is another model
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    with ServerProcess(store, model=str(model)) as server:
        refused = server.post("/generate", tenant="ada", prompt=DOG)
        assert refused.json()["error"]["code"] == "model_mismatch"
        with server.http.stream("POST", "/tenants/ada/rebuild", json={"stream": True}) as answer:
            assert next(answer.iter_lines()) == "event: progress"
            server.kill()
    with ServerProcess(store, model=str(model)) as server:
        before = server.http.get("/tenants/ada").json()
        assert (before["memory_version"], before["lineage"]) == (41, 0)
        rebuilt = server.post("/tenants/ada/rebuild", force=False).json()
        assert (rebuilt["rebuilt"], rebuilt["blocks"], rebuilt["lineage"]) == (True, 41, 1)
        # the weights are the same, and so is the memory they make
        assert ask(server, "ada", DOG) == expected
        assert server.http.get("/tenants/ada/memory").json() == told
        assert server.update("ada", "My dog is called Rex.", idempotency_key="dog")["replayed"]
