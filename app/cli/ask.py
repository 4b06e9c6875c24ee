"""``memoryllm generate``, ``chat`` and ``score``: what a memory makes the model say."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from app.cli.errors import Refusal
from app.cli.http import Api, tenant_path
from app.cli.options import DEFAULT_TENANT, DEFAULT_URL, Json, Tenant, Url
from app.cli.output import err, out, print_json, write
from app.cli.teach import send_update

CHAT_HELP = """/remember TEXT  put a text into the memory
/history        the latest updates
/memory         how much of which update is left
/help           this list
/quit           leave (or Ctrl-D)"""


def _given(**parameters: Any) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}


def _stream_text(api: Api, body: dict[str, Any]) -> dict[str, Any]:
    """Prints the text as it comes; the last chunk."""
    last: dict[str, Any] = {}
    for event in api.stream("/generate", body | {"stream": True}):
        write(event.data.get("text", ""))
        last = event.data
    write("\n")
    return last


def generate(
    prompt: Annotated[str, typer.Argument(help="the prompt; - reads standard input")],
    tenant: Tenant = DEFAULT_TENANT,
    chat: Annotated[bool, typer.Option("--chat", help="send the prompt as a user's message")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="most tokens to generate")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text (repeatable)")] = None,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="default: on a terminal")
    ] = None,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Generate text from a prompt and a tenant's memory."""
    text = sys.stdin.read() if prompt == "-" else prompt
    asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    body = {"tenant": tenant} | asked | _given(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or None,
    )  # fmt: skip
    with Api(url, as_json=json) as api:
        if json:
            print_json(api.call("POST", "/generate", body))
        elif stream if stream is not None else out.is_terminal:
            _stream_text(api, body)
        else:
            write(api.call("POST", "/generate", body)["text"] + "\n")


def score(
    prompt: Annotated[str, typer.Argument(help="the text before")],
    continuation: Annotated[str, typer.Argument(help="the text whose probability is asked for")],
    tenant: Tenant = DEFAULT_TENANT,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Log-probabilities of a continuation, token by token."""
    with Api(url, as_json=json) as api:
        body = {"tenant": tenant, "prompt": prompt, "continuation": continuation}
        answer = api.call("POST", "/score", body)
    if json:
        print_json(answer)
        return
    logprobs = answer["logprobs"]
    out.print(
        f"log-probability {sum(logprobs):.4f} over {len(logprobs)} tokens, "
        f"{sum(answer['greedy'])} of them the model's first choice"
    )


def chat(
    tenant: Tenant = DEFAULT_TENANT,
    turns: Annotated[int, typer.Option(help="earlier turns sent along with each message")] = 0,
    max_tokens: Annotated[int | None, typer.Option(help="most tokens of an answer")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Talk with a memory. /remember TEXT teaches it, /help lists the rest."""
    person = sys.stdin.isatty()
    said: list[dict[str, str]] = []
    with Api(url) as api:
        while True:
            try:
                line = err.input("[bold]> [/bold]") if person else input()
            except EOFError:
                return
            try:
                if not _chat_line(api, tenant, line.strip(), said, turns, _given(
                    max_tokens=max_tokens, temperature=temperature
                )):  # fmt: skip
                    return
            except Refusal as refusal:
                # a refused message ends a script, not a conversation
                if not person:
                    raise
                refusal.show()


def _chat_line(
    api: Api, tenant: str, line: str, said: list[dict[str, str]], turns: int, sampling: dict[str, Any]
) -> bool:
    """One line of a chat. False if it was the last."""
    command, _, rest = line.partition(" ")
    if not line:
        return True
    if command in ("/quit", "/exit"):
        return False
    if command == "/remember":
        answer = send_update(api, {"tenant": tenant, "text": rest, "short": "repeat"}, show=err.is_terminal)
        out.print(f"(version {answer['memory_version']})", style="dim")
    elif command == "/history":
        for item in api.call("GET", tenant_path(tenant, "/history"), limit=10)["updates"]:
            share = f"{item['surviving_share']:.0%}"
            out.print(f"{item['memory_version']:>6}  {share:>4} left  {item['text'] or ''}", markup=False)
    elif command == "/memory":
        info = api.call("GET", tenant_path(tenant))
        out.print(f"version {info['memory_version']}, {info['bytes']:,} bytes stored", markup=False)
    elif command == "/help":
        out.print(CHAT_HELP, markup=False)
    elif command.startswith("/"):
        out.print(f"unknown command {command}; /help lists them", markup=False)
    else:
        said.append({"role": "user", "content": line})
        body = {"tenant": tenant, "messages": said[-2 * turns - 1 :]} | sampling
        text = ""
        for event in api.stream("/generate", body | {"stream": True}):
            text += event.data.get("text", "")
            write(event.data.get("text", ""))
        write("\n")
        said.append({"role": "assistant", "content": text})
    return True


def register(app: typer.Typer) -> None:
    app.command()(generate)
    app.command()(chat)
    app.command()(score)
