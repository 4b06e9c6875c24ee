"""The worker's own step loop without HTTP, in a process of its own, to hold the server against.

``python -m loadtest.bare`` answers one JSON line on standard output for each on standard input, the first of which
says how to build the engine. Kept apart from the generator so that torch's threads and memory are not in its way.
"""

from __future__ import annotations

import json
import select
import sys
import tempfile
import time
from pathlib import Path
from subprocess import PIPE, Popen
from types import TracebackType
from typing import Any

from loadtest.server import ROOT, environment


class Bare:
    """The engine in its own process. Use as a context manager."""

    def __init__(self, **settings: Any) -> None:
        self._process = Popen(
            [sys.executable, "-m", "loadtest.bare"],
            cwd=ROOT,
            env=environment(),
            stdin=PIPE,
            stdout=PIPE,
            text=True,
        )
        self.sizes = self._call(settings)

    def _call(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the engine without a server has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def generate(self, tenants: int, tokens: int, prompt: str) -> float:
        """Tokens per second of one generation for each of ``tenants``, all at once."""
        answer = self._call({"tenants": tenants, "tokens": tokens, "prompt": prompt})
        return float(answer["tokens"]) / float(answer["seconds"])

    def __enter__(self) -> Bare:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.stdout.close()


def sizes(model: str) -> dict[str, Any]:
    """``pool``, ``copy``: bytes of a tenant's pool and of its rotated copy; ``fingerprint`` for a store made ahead."""
    import torch

    from app.memory.arena import Arena
    from app.model.backbone import Backbone
    from app.model.checkpoint import load_weights, resolve
    from app.model.config import read_config

    directory = resolve(model)
    config = read_config(directory)
    weights, fingerprint = load_weights(directory, config, dtype=torch.float32, device=torch.device("cpu"))
    backbone = Backbone(config, weights, 16)
    return {
        "pool": Arena.bytes_per_pool(backbone),
        "copy": Arena.bytes_per_copy(backbone),
        "fingerprint": fingerprint,
    }


def _serve() -> None:
    from app.api.tokens import Tokenizer
    from app.messages import Finished, Generate, Sampling
    from app.model.checkpoint import resolve
    from app.settings import Settings
    from app.store.disk import DiskStore
    from app.worker.build import build
    from app.worker.loop import Background

    wanted = json.loads(sys.stdin.readline())
    if "sizes" in wanted:
        print(json.dumps(sizes(wanted["sizes"])), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="loadtest-") as scratch:
        background = Background()
        engine = build(Settings(**wanted), DiskStore(Path(scratch) / "store"), background.submit).engine
        tokenizer = Tokenizer.load(resolve(wanted.get("model", "pocket")))
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            assert tokenizer is not None
            prompt = tokenizer.ids(asked["prompt"])
            began, made, finished = time.perf_counter(), 0, 0
            for number in range(asked["tenants"]):
                sampling = Sampling(asked["tokens"], temperature=0.0)
                engine.handle(Generate(f"{number}", f"t{number}", prompt, sampling))
            while finished < asked["tenants"]:
                background.drain()
                if not engine.step() and not engine.outbox:
                    # nothing can move before a background thread rings, as in the worker's own loop
                    select.select([background.wake], [], [], 1.0)
                for answer in engine.outbox:
                    if isinstance(answer, Finished):
                        finished += 1
                        made += answer.completion_tokens
                engine.outbox = []
            print(json.dumps({"tokens": made, "seconds": time.perf_counter() - began}), flush=True)
        background.close()


if __name__ == "__main__":
    _serve()
