"""``memoryllm generate`` and ``score``: what a memory makes the model say."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from app.cli.http import Answer, Api
from app.cli.options import DEFAULT_TENANT, DEFAULT_URL, Json, Tenant, Url, text_of
from app.cli.output import out, print_json, write

Prompt = Annotated[str, typer.Argument(help="the prompt; - reads standard input")]


def given(**parameters: Any) -> dict[str, Any]:
    """Those that the user named; the server knows the defaults of the rest."""
    return {name: value for name, value in parameters.items() if value is not None}


def speak(api: Api, body: dict[str, Any]) -> str:
    """Writes a generation as it comes, with a line feed behind it however it ends; its text."""
    pieces: list[str] = []
    try:
        for event in api.stream("/generate", body):
            pieces.append(str(event.data["text"]))
            write(pieces[-1])
    except BaseException:
        if pieces:
            write("\n")
        raise
    write("\n")
    return "".join(pieces)


def generate(
    prompt: Prompt,
    tenant: Tenant = DEFAULT_TENANT,
    chat: Annotated[bool, typer.Option("--chat", help="send the prompt as a user's message")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="most tokens to generate")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest token")] = None,
    top_p: Annotated[float | None, typer.Option(help="draw from the likeliest tokens of this share")] = None,
    top_k: Annotated[int | None, typer.Option(help="draw from this many likeliest tokens")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="leave out tokens below this part of the likeliest")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="above 1: repeat less")] = None,
    seed: Annotated[int | None, typer.Option(help="the same seed draws the same tokens")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text (repeatable)")] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="go on past the model's stop tokens")
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream", help="print as it comes (default on a terminal); with --json, events"
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Generate text from a prompt and a tenant's memory."""
    with Api(url, as_json=json) as api:
        text = text_of(prompt)
        asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        sampling = given(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop or None,
            ignore_eos=ignore_eos or None,
        )
        body = {"tenant": tenant} | asked | sampling
        if json and stream:
            for event in api.stream("/generate", body):
                print_json(event.data)
        elif json:
            print_json(api.call("POST", "/generate", body))
        elif stream or (stream is None and sys.stdout.isatty()):
            speak(api, body)
        else:
            write(f"{api.call('POST', '/generate', body)['text']}\n")


def score(
    prompt: Prompt,
    continuation: Annotated[str, typer.Argument(help="the text whose probability is asked for")],
    tenant: Tenant = DEFAULT_TENANT,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Log-probability of a continuation after a prompt."""
    with Api(url, as_json=json) as api:
        body = {"tenant": tenant, "prompt": text_of(prompt), "continuation": continuation}
        answer = api.call("POST", "/score", body)
        print_json(answer) if json else out.print(_told(answer), markup=False)


def _told(answer: Answer) -> str:
    logprobs, greedy = answer["logprobs"], answer["greedy"]
    return (
        f"log-probability {sum(logprobs):.4f} over {len(logprobs)} tokens, "
        f"{sum(greedy)} of them the model's first choice"
    )


def register(app: typer.Typer) -> None:
    app.command()(generate)
    app.command()(score)
