"""Drives an engine in the test's own thread: requests in, answers out, background work at once or delayed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch

from app.errors import ServiceError
from app.memory.arena import Arena
from app.memory.lanes import lanes_of
from app.memory.residency import Residency
from app.messages import (
    Answer,
    Context,
    Decoded,
    Failed,
    Finished,
    Generate,
    Request,
    Sampling,
    Score,
    Scored,
    Tokens,
    Update,
    Updated,
)
from app.model.backbone import Backbone
from app.model.checkpoint import load_weights
from app.model.config import read_config
from app.model.operations import MakeOperations
from app.model.torch_operations import TorchOperations
from app.store.base import Store
from app.worker.engine import Engine
from app.worker.graphs import Capture
from app.worker.scheduler import Limits
from tests.fakes import MemoryStore

CHECKPOINTS = Path(__file__).parent / "checkpoints"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir() if (path / "config.json").exists())

Done = Callable[[object, ServiceError | None], None]


class Inline:
    """Background work done when ``drain`` is called: deterministic, yet never inside the call that asks."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[[], object], Done]] = []

    def submit(self, work: Callable[[], object], done: Done) -> None:
        self.waiting.append((work, done))

    def drain(self) -> None:
        waiting, self.waiting = self.waiting, []
        for work, done in waiting:
            try:
                result, error = work(), None
            except ServiceError as raised:
                result, error = None, raised
            done(result, error)


def load_backbone(
    name: str,
    dtype: torch.dtype = torch.float32,
    max_sequence: int = 256,
    operations: MakeOperations = TorchOperations,
    device: str = "cpu",
) -> tuple[Backbone, str]:
    directory = CHECKPOINTS / name
    config = read_config(directory)
    weights, fingerprint = load_weights(directory, config, dtype=dtype, device=torch.device(device))
    return Backbone(config, weights, max_sequence, operations), fingerprint


class Harness:
    """One engine over a store in memory (or the one given)."""

    def __init__(
        self,
        backbone: Backbone,
        fingerprint: str = "test",
        *,
        store: Store | None = None,
        slots: int = 4,
        hot: int | None = None,
        warm_bytes: int = 0,
        limits: Limits | None = None,
        compacted_after: int | None = None,
        capture: Capture | None = None,
        plans_ahead: bool = False,
    ) -> None:
        self.store: Store = store or MemoryStore()
        self.inline = Inline()
        arena = Arena(backbone, slots, slots + 2 if hot is None else hot)
        lanes = lanes_of(backbone.device, backbone.dtype)
        residency = Residency(backbone, arena, self.store, fingerprint, warm_bytes, self.inline.submit, lanes)
        self.engine = Engine(
            backbone,
            arena,
            residency,
            self.store,
            limits or Limits(cache_rows=4096),
            self.inline.submit,
            max_sequence=256,
            compacted_after=compacted_after or backbone.config.num_blocks,
            capture=capture,
            plans_ahead=plans_ahead,
        )
        self.answers: list[Answer] = []
        self._ids = itertools.count()

    def send(self, message: Request) -> None:
        self.engine.handle(message)
        self._collect()

    def _collect(self) -> None:
        for answer in self.engine.outbox:
            self.answers += answer.each() if isinstance(answer, Decoded) else [answer]
        self.engine.outbox = []

    def step(self) -> bool:
        self.inline.drain()
        moved = self.engine.step()
        self._collect()
        return moved

    def run(self, steps: int = 10_000) -> None:
        """Steps until nothing is left to do."""
        for _ in range(steps):
            self.step()
            if self.engine.idle and not self.inline.waiting:
                return
        raise AssertionError("the engine did not come to rest")

    def id(self) -> str:
        return f"r{next(self._ids)}"

    # ------------------------------------------------------------ whole requests

    def of(self, request_id: str) -> list[Answer]:
        return [a for a in self.answers if getattr(a, "id", None) == request_id]

    def final(self, request_id: str) -> Answer:
        return self.of(request_id)[-1]

    def tokens(self, request_id: str) -> list[int]:
        return [t for a in self.of(request_id) if isinstance(a, Tokens) for t in a.tokens]

    def begin_update(self, tenant: str, *contexts: list[int], key: str | None = None) -> str:
        request_id = self.id()
        self.send(Update(request_id, tenant, [Context(c) for c in contexts], key))
        return request_id

    def begin_generate(self, tenant: str, prompt: list[int], max_tokens: int = 24, **sampling: object) -> str:
        request_id = self.id()
        self.send(Generate(request_id, tenant, prompt, Sampling(max_tokens, **sampling)))  # type: ignore[arg-type]
        return request_id

    def begin_score(self, tenant: str, prompt: list[int], continuation: list[int]) -> str:
        request_id = self.id()
        self.send(Score(request_id, tenant, prompt, continuation))
        return request_id

    def update(self, tenant: str, *contexts: list[int], key: str | None = None) -> Updated:
        request_id = self.begin_update(tenant, *contexts, key=key)
        self.run()
        answer = self.final(request_id)
        assert isinstance(answer, Updated), answer
        return answer

    def generate(self, tenant: str, prompt: list[int], max_tokens: int = 24, **sampling: object) -> list[int]:
        request_id = self.begin_generate(tenant, prompt, max_tokens, **sampling)
        self.run()
        answer = self.final(request_id)
        assert isinstance(answer, Finished), answer
        return self.tokens(request_id)

    def score(self, tenant: str, prompt: list[int], continuation: list[int]) -> Scored:
        request_id = self.begin_score(tenant, prompt, continuation)
        self.run()
        answer = self.final(request_id)
        assert isinstance(answer, Scored), answer
        return answer

    def failure(self, request_id: str) -> Failed:
        answer = self.final(request_id)
        assert isinstance(answer, Failed), answer
        return answer
