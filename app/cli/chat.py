"""``memoryllm chat``: a conversation with a memory, line by line, on a terminal or from a pipe."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer

from app.cli.ask import given, speak
from app.cli.errors import Refusal
from app.cli.http import Api, tenant_path
from app.cli.options import DEFAULT_TENANT, DEFAULT_URL, Tenant, Url
from app.cli.output import err, out
from app.cli.teach import send_update, told
from app.cli.tenants import history_table, memory_table

HELP = """/remember TEXT  put a text into the memory
/history        the latest updates
/memory         how much of which update is left
/help           this list
/quit           leave (or Ctrl-D)"""


class Conversation:
    """Sends lines as messages and obeys those that begin with a slash.

    ``turns`` earlier questions and their answers go along with each message; the memory is the server's.
    """

    def __init__(self, api: Api, tenant: str, turns: int, sampling: dict[str, Any]) -> None:
        self._api, self._tenant = api, tenant
        self._turns, self._sampling = turns, sampling
        self._said: list[dict[str, str]] = []

    def line(self, line: str) -> bool:
        """False if it was the last. Raises Refusal."""
        command, _, rest = line.partition(" ")
        match command:
            case "":
                pass
            case "/quit" | "/exit":
                return False
            case "/remember":
                self._remember(rest.strip())
            case "/history":
                answer = self._api.call("GET", tenant_path(self._tenant, "/history"), limit=10)
                out.print(history_table(answer))
            case "/memory":
                out.print(memory_table(self._api.call("GET", tenant_path(self._tenant, "/memory"))))
            case "/help":
                out.print(HELP, markup=False)
            case _ if command.startswith("/"):
                err.print(f"there is no {command}; /help lists what there is", markup=False)
            case _:
                self._ask(line)
        return True

    def _remember(self, text: str) -> None:
        if not text:
            err.print("what? /remember TEXT", markup=False)
            return
        body = {"tenant": self._tenant, "text": text, "short": "repeat"}
        answer = send_update(self._api, body, show=err.is_terminal)
        err.print(told(answer, self._tenant), style="dim", markup=False)

    def _ask(self, question: str) -> None:
        asked = {"role": "user", "content": question}
        earlier = self._said[-2 * self._turns :] if self._turns else []
        body = {"tenant": self._tenant, "messages": [*earlier, asked]} | self._sampling
        answer = speak(self._api, body)
        # only whole turns are told again, and no message may be empty
        if answer:
            self._said += [asked, {"role": "assistant", "content": answer}]


def chat(
    tenant: Tenant = DEFAULT_TENANT,
    turns: Annotated[int, typer.Option(min=0, help="earlier turns sent along with each message")] = 0,
    max_tokens: Annotated[int | None, typer.Option(help="most tokens of an answer")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest token")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Talk with a memory. /remember TEXT teaches it, /help lists the rest."""
    person = sys.stdin.isatty()
    if person:
        # lines can be edited and called back
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        err.print(f"talking with {tenant!r}; /help lists the commands", style="dim", markup=False)
    with Api(url) as api:
        conversation = Conversation(api, tenant, turns, given(max_tokens=max_tokens, temperature=temperature))
        while True:
            try:
                line = input("> " if person else "")
            except EOFError:
                return
            try:
                if not conversation.line(line.strip()):
                    return
            except Refusal as refusal:
                # a refused message ends a script, not a conversation
                if not person:
                    raise
                refusal.show()
            except KeyboardInterrupt:
                # ends the answer; at the prompt, the conversation
                if not person:
                    raise


def register(app: typer.Typer) -> None:
    app.command()(chat)
