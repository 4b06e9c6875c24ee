"""First token, decode and update on a CPU, against the official implementation's own work on the same weights.

    python -m experiments.reference --checkout DIR [--python PATH] [--threads 2] [--rounds 5]

``DIR`` is a checkout of the official MemoryLLM repository, ``PATH`` an interpreter that can import it (it
wants transformers 4.48). One random checkpoint in the published format is loaded by both. Ours is the
worker's engine, driven in this process from message to answer, on a disk store; theirs is ``generate`` and
``inject_memory`` in a subprocess. Rounds alternate, so that a machine that gets slower gets slower for both.
First both must give the same tokens and log-probabilities, and write the same block; otherwise nothing is
timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from app.errors import ServiceError
from app.messages import (
    Answer,
    Context,
    Decoded,
    Failed,
    Finished,
    Generate,
    Request,
    Sampling,
    Tokens,
    Update,
    Updated,
)
from app.model.config import ModelConfig
from app.settings import Settings
from app.store.url import open_store
from app.worker.build import build
from experiments import random_checkpoint
from experiments.machine import processor

SHAPE = random_checkpoint.shape(
    layers=12,
    hidden=768,
    heads=12,
    kv_heads=4,
    intermediate=2048,
    vocab=32_000,
    num_blocks=50,
    num_tokens=256,
)
PROMPT, DECODED, CONTEXT = 32, 16, 512
COMPARED = 20
TOLERANCE = 1e-3


Done = Callable[[object, ServiceError | None], None]


class Disagreement(RuntimeError):
    """The two implementations do not compute the same thing; a comparison of their times means nothing."""


@dataclass
class Round:
    """Seconds: until the first token, per decoded token, for one update."""

    first: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)

    def generated(self, times: list[float]) -> None:
        self.first.append(times[0])
        self.decode.append((times[-1] - times[0]) / (len(times) - 1))


class Ours:
    """The worker's engine, without the sockets around it."""

    def __init__(self, checkpoint: Path, store: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        settings = Settings.model_validate(
            {
                "model": str(checkpoint),
                "device": "cpu",
                "dtype": "float32",
                "store": f"disk://{store}",
                "resident_bytes": 2**31,
                "max_sequence": 1024,
                "context_tokens": 4096,
            }
        )
        self._background: list[tuple[Callable[[], object], Done]] = []
        self._store = open_store(settings.store)
        self.engine = build(settings, self._store, self._submit).engine
        self._requests = 0

    def _submit(self, work: Callable[[], object], done: Done) -> None:
        """Background work, done between steps, where its time counts in full."""
        self._background.append((work, done))

    def _drain(self) -> None:
        waiting, self._background = self._background, []
        for work, done in waiting:
            done(work(), None)

    def _do(self, message: Request) -> tuple[list[Answer], list[float]]:
        """The request's answers, and when each came: seconds after it was handed in."""
        answers: list[Answer] = []
        times: list[float] = []
        start = time.perf_counter()
        self.engine.handle(message)
        while not answers or not isinstance(answers[-1], Finished | Updated | Failed):
            self._drain()
            self.engine.step()
            for answer in self.engine.outbox:
                answers += answer.each() if isinstance(answer, Decoded) else [answer]
            self.engine.outbox = []
            times += [time.perf_counter() - start] * (len(answers) - len(times))
        if isinstance(answers[-1], Failed):
            raise RuntimeError(answers[-1].message)
        return answers, times

    def _id(self) -> str:
        self._requests += 1
        return f"r{self._requests}"

    def generate(
        self, prompt: list[int], count: int, logprobs: int | None = None
    ) -> tuple[list[int], list[float], list[list[tuple[int, float]]]]:
        """Greedy tokens of the reading tenant, when each came, and the likeliest tokens of each step."""
        answers, times = self._do(Generate(self._id(), "read", prompt, Sampling(count, logprobs=logprobs)))
        came = [(a, t) for a, t in zip(answers, times, strict=True) if isinstance(a, Tokens)]
        tokens = [token for a, _ in came for token in a.tokens]
        top = [entry.top for a, _ in came for entry in a.logprobs or []]
        return tokens, [t for _, t in came], top

    def update(self, context: list[int]) -> float:
        """Seconds until the update of the other tenant is durable and published."""
        _, times = self._do(Update(self._id(), "written", [Context(context)]))
        return times[-1]

    def block(self) -> torch.Tensor:
        """The newest block's sum over layers and hidden size, [K], as it lies in the store."""
        manifest = self._store.load("written")
        assert manifest is not None
        hidden = self.engine.residency.pool(manifest).hidden
        return hidden[:, -SHAPE.num_tokens :].sum(dim=(0, 2))

    def close(self) -> None:
        self._store.close()


class Theirs:
    """The official implementation in a subprocess (``experiments/reference_side.py``)."""

    def __init__(self, python: str, checkout: Path, checkpoint: Path, threads: int, attention: str) -> None:
        script = Path(__file__).with_name("reference_side.py")
        command = [python, str(script), "--checkout", str(checkout), "--checkpoint", str(checkpoint)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [*command, "--threads", str(threads), "--attention", attention],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        self.versions: dict[str, str] = self._answer()

    def __enter__(self) -> Theirs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            said = self._log.read()[-3000:]
            self._close()
            raise RuntimeError(f"the official implementation ended:\n{said}")
        return json.loads(line)

    def _ask(self, **request: object) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def generate(self, prompt: list[int], count: int, want_logits: bool = False) -> Any:
        return self._ask(do="generate", prompt=prompt, tokens=count, want_logits=want_logits)

    def update(self, context: list[int], want_block: bool = False) -> Any:
        return self._ask(do="update", context=context, want_block=want_block)


def agree(ours: Ours, theirs: Theirs, prompt: list[int], context: list[int]) -> float:
    """The largest difference of a log-probability. Raises Disagreement. Warms both up, too."""
    tokens, _, top = ours.generate(prompt, 1 + DECODED, logprobs=COMPARED)
    answer = theirs.generate(prompt, 1 + DECODED, want_logits=True)
    if tokens != answer["tokens"]:
        raise Disagreement(f"greedy tokens differ: {tokens} and {answer['tokens']}")
    worst = 0.0
    for likeliest, logits in zip(top, answer["logits"], strict=True):
        logprobs = torch.tensor(logits).log_softmax(dim=-1)
        worst = max(worst, *(abs(value - logprobs[token].item()) for token, value in likeliest))
    if not worst <= TOLERANCE:
        raise Disagreement(f"log-probabilities differ by up to {worst:.2g}")
    ours.update(context)
    block = torch.tensor(theirs.update(context, want_block=True)["block"])
    difference = (ours.block() - block).abs().max().item() / block.abs().max().item()
    if not difference <= TOLERANCE:
        raise Disagreement(f"the blocks that an update writes differ by up to {difference:.2g} of their size")
    return worst


def measure(
    ours: Ours, theirs: Theirs, prompt: list[int], context: list[int], rounds: int
) -> tuple[Round, Round]:
    """Alternating rounds. Raises Disagreement if tokens ever differ."""
    own, other = Round(), Round()
    for index in range(rounds):
        tokens, times, _ = ours.generate(prompt, 1 + DECODED)
        answer = theirs.generate(prompt, 1 + DECODED)
        if tokens != answer["tokens"]:
            raise Disagreement("greedy tokens differ")
        own.generated(times)
        other.generated(answer["times"])
        own.update.append(ours.update(context))
        other.update.append(theirs.update(context)["seconds"])
        print(
            f"round {index + 1} of {rounds}: first token {own.first[-1]:.3f} s and {other.first[-1]:.3f} s, "
            f"decode {own.decode[-1]:.4f} s and {other.decode[-1]:.4f} s",
            file=sys.stderr,
        )
    return own, other


def table(own: Round, other: Round) -> str:
    """Markdown: medians and minima in milliseconds, and their ratios."""
    lines = [
        "| CPU, fp32 | ours, median (min) | official, median (min) | ratio of medians | of minima |",
        "|---|---|---|---|---|",
    ]
    rows: list[tuple[str, Callable[[Round], list[float]]]] = [
        (f"first token, {PROMPT}-token prompt", lambda r: r.first),
        ("decode, per token", lambda r: r.decode),
        (f"update, {CONTEXT} tokens", lambda r: r.update),
    ]
    for name, pick in rows:
        a, b = pick(own), pick(other)
        middle, least = statistics.median(b) / statistics.median(a), min(b) / min(a)
        lines.append(f"| {name} | {_show(a)} | {_show(b)} | {middle:.1f} | {least:.1f} |")
    return "\n".join(lines)


def _show(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:,.0f} ms ({min(seconds) * 1e3:,.0f} ms)"


def describe(config: ModelConfig, versions: dict[str, str], threads: int, attention: str) -> str:
    c = config
    return (
        f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores, {threads} threads, "
        f"load average {os.getloadavg()[0]:.1f} at the end.\n"
        f"{c.num_layers} layers, d {c.hidden_size}, {c.num_heads}/{c.num_kv_heads} heads, "
        f"N = {c.num_blocks} x {c.num_tokens}, vocabulary {c.vocab_size}, random weights.\n"
        f"Ours: torch {torch.__version__}, Python {platform.python_version()}. Official: {attention} attention "
        f"(flash_attention_2 needs a GPU), transformers {versions['transformers']}, "
        f"torch {versions['torch']}, Python {versions['python']}."
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.reference")
    parser.add_argument("--checkout", type=Path, required=True, help="the official repository")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that can import it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa", help="the official one's")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, SHAPE.vocab_size, (PROMPT,), generator=generator).tolist()
    context = torch.randint(3, SHAPE.vocab_size, (CONTEXT,), generator=generator).tolist()
    with tempfile.TemporaryDirectory(prefix="memoryllm-reference-") as directory:
        checkpoint = Path(directory) / "checkpoint"
        random_checkpoint.write(checkpoint, SHAPE, seed=0)
        ours = Ours(checkpoint, Path(directory) / "store", arguments.threads)
        with Theirs(
            arguments.python, arguments.checkout, checkpoint, arguments.threads, arguments.attention
        ) as theirs:
            try:
                worst = agree(ours, theirs, prompt, context)
                own, other = measure(ours, theirs, prompt, context, arguments.rounds)
            except Disagreement as error:
                print(f"no comparison: {error}", file=sys.stderr)
                return 1
            finally:
                ours.close()
            print(table(own, other))
            print()
            print(describe(SHAPE, theirs.versions, arguments.threads, arguments.attention))
    print(
        f"Both gave the same {1 + DECODED} tokens every time; log-probabilities differ by at most {worst:.1g}. "
        "Our update is durable on disk; the official one is in memory."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
