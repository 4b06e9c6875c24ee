"""The command as a process: what it imports, what a terminal shows, and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import UPDATED, Fake, Reply, Start


def test_client_commands_import_neither_torch_nor_the_server(fake: Fake) -> None:
    fake.generated("a")
    code = (
        "import sys\nfrom app.cli import main\n"
        f"try: main(['generate', 'x', '--stream', '--url', '{fake.url}'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'numpy', 'fastapi', 'uvicorn', 'zmq', 'app.api'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "a\n[]\n"


def test_ctrl_c_ends_a_generation_and_its_connection(fake: Fake, start: Start) -> None:
    fake.events("/generate", (None, {"text": "Tar"}), open_end=True)
    process = start("generate", "x", "--stream")
    assert process.stdout is not None
    assert process.stdout.read(3) == b"Tar"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"\n")
    assert b"Traceback" not in err
    assert fake.client_left.wait(60)


def test_a_reader_that_goes_away_is_no_failure_to_trace(fake: Fake, start: Start) -> None:
    fake.events("/generate", *[(None, {"text": "x" * 60_000})] * 20, open_end=True)
    process = start("generate", "x", "--stream")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    assert process.wait(60) == 1


def test_no_standard_input_and_a_full_disk_are_no_failures_to_trace(fake: Fake, tmp_path: Path) -> None:
    fake.answer("/health", {})
    command = f"{sys.executable} -m app.cli"
    closed = subprocess.run(
        ["sh", "-c", f"{command} generate - <&-"], capture_output=True, text=True, check=False
    )
    assert (closed.returncode, closed.stdout) == (2, "")
    assert "standard input" in closed.stderr
    full = subprocess.run(
        ["sh", "-c", f"{command} version >/dev/full"], capture_output=True, text=True, check=False
    )
    assert full.returncode == 5
    assert "No space left" in full.stderr
    assert "Traceback" not in closed.stderr + full.stderr


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, start: Start, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = start(
            *arguments, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""
        self._read = 0

    def until(self, text: str) -> None:
        """Reads until ``text`` was shown after what was waited for before."""
        while (found := self.shown.find(text, self._read)) < 0:
            self.shown += os.read(self._ours, 4096).decode("utf-8", "replace")
        self._read = found + len(text)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def end(self) -> int:
        """Reads the rest; the exit code."""
        # reading from a terminal that nobody has open fails
        with contextlib.suppress(OSError):
            while chunk := os.read(self._ours, 4096):
                self.shown += chunk.decode("utf-8", "replace")
        return self.process.wait(60)

    def close(self) -> None:
        os.close(self._ours)


OnTerminal = Callable[..., Terminal]


@pytest.fixture
def terminal(start: Start) -> Iterator[OnTerminal]:
    """Starts a command on a terminal."""
    with contextlib.ExitStack() as stack:

        def on_terminal(*arguments: str) -> Terminal:
            return stack.enter_context(contextlib.closing(Terminal(start, *arguments)))

        yield on_terminal


def test_on_a_terminal_text_comes_as_it_is_made_and_cannot_steer(fake: Fake, terminal: OnTerminal) -> None:
    fake.generated("a\x1b[2J", "b")
    shell = terminal("generate", "x")
    assert shell.end() == 0
    assert "a\\x1b[2Jb" in shell.shown
    assert fake.seen[0][2]["stream"] is True


def test_on_a_terminal_an_update_shows_its_progress(fake: Fake, terminal: OnTerminal) -> None:
    fake.events("/update", ("progress", {"done": 1, "total": 2}), ("done", UPDATED))
    shell = terminal("update", "x")
    assert shell.end() == 0
    assert "remembering" in shell.shown
    assert "2 blocks" in shell.shown


def test_on_a_terminal_what_is_done_to_a_memory_shows_its_progress(
    fake: Fake, terminal: OnTerminal, tmp_path: Path
) -> None:
    done = {"id": "ada", "memory_version": 1}
    for path in ("/fork", "/rollback", "/import", ""):
        fake.answer(f"/tenants/ada{path}", done)
    fake.events("/tenants/ada/rebuild", ("progress", {"done": 1, "total": 2}), ("done", done))
    fake.reply("/tenants/ada/export", Reply(kind="application/octet-stream", body=bytes(3 << 20)))
    file = str(tmp_path / "file")
    for verb, rest, told in (
        ("fork", ["bob"], "forking"),
        ("rollback", ["0", "--yes"], "rolling back"),
        ("rebuild", [], "rebuilding"),
        ("export", [file], "exporting"),
        ("import", [file], "importing"),
        ("erase", ["--yes"], "erasing"),
    ):
        shell = terminal("tenants", verb, "ada", *rest)
        assert shell.end() == 0, shell.shown
        assert told in shell.shown
    quiet = terminal("tenants", "fork", "ada", "bob", "--json")
    assert quiet.end() == 0
    assert "forking" not in quiet.shown


def test_erasing_asks(fake: Fake, terminal: OnTerminal) -> None:
    fake.answer("/tenants/ada", {"id": "ada", "erased": True})
    shell = terminal("tenants", "erase", "ada")
    shell.until("[y/N]")
    shell.type("n\n")
    assert shell.end() == 1
    assert fake.seen == []
    shell = terminal("tenants", "erase", "ada")
    shell.until("[y/N]")
    shell.type("y\n")
    assert shell.end() == 0
    assert fake.seen == [("DELETE", "/tenants/ada", None)]


def test_a_conversation_outlives_refusals_and_interrupted_answers(fake: Fake, terminal: OnTerminal) -> None:
    fake.answer("/generate", {"error": {"message": "too long", "code": "too_many_tokens"}}, 422)
    shell = terminal("chat")
    shell.until("> ")
    shell.type("a\n")
    shell.until("too long")
    shell.until("> ")
    fake.events("/generate", (None, {"text": "Tarnovik"}), open_end=True)
    shell.type("b\n")
    shell.until("Tarnovik")
    shell.process.send_signal(signal.SIGINT)
    assert fake.client_left.wait(60)
    shell.until("> ")
    shell.type("/quit\n")
    assert shell.end() == 0


def test_ctrl_c_at_the_prompt_ends_a_conversation(terminal: OnTerminal) -> None:
    shell = terminal("chat")
    shell.until("> ")
    shell.process.send_signal(signal.SIGINT)
    # a signal just before readline waits for a key is seen at the next one
    with contextlib.suppress(OSError):
        shell.type("\n")
    assert shell.end() == 130
