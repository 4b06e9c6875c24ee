"""An app with a fake worker in this process, reached over ASGI; and a tokenizer trained on the spot."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import tokenizers
from fastapi import FastAPI
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from app import logs
from app import messages as m
from app.api.app import create_app
from app.api.tokens import Tokenizer
from app.api.worker import WorkerClient
from app.settings import Settings
from tests.api.fake_worker import EOS, VOCAB, FakeWorker, model_info

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It never rains in Lisbon, says Maya; she teaches the cello.",
    "What does she teach? She teaches the cello. Where does she live? She lives in Lisbon.",
    "Ein Vogel saß auf dem Dach. Über den Wolken… 東京は日本の首都です。Привет, мир! 👩‍👩‍👧 and 👍🏽.",
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    logs.configure(Settings(log_level="error"))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level BPE tokenizer of fewer than VOCAB tokens, as checkpoints have."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 100,
        special_tokens=["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.token_to_id("</s>") == EOS
    assert tokenizer.get_vocab_size() <= VOCAB
    # as Llama's tokenizers do, whose BOS the model does not want
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    loaded = Tokenizer.load(model_dir)
    assert loaded is not None
    return loaded


@dataclass
class Service:
    """An app whose worker is ``fake``; what the worker was sent is in ``fake.seen``."""

    app: FastAPI
    client: WorkerClient
    fake: FakeWorker
    http: httpx.AsyncClient
    settings: Settings
    frames: list[int] = field(default_factory=list)

    @property
    def seen(self) -> list[m.Request]:
        return self.fake.seen

    async def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **more)

    def answer(self, *answers: m.Answer) -> None:
        """As if the worker had sent them in one frame."""
        self.client.received(m.decode_answers(m.encode(list(answers))), 0.0)

    async def until_seen(self, kind: type[m.Message], count: int = 1) -> m.Message:
        """The ``count``-th message of this kind that the worker was sent, once it was."""
        await until(lambda: sum(isinstance(message, kind) for message in self.seen) >= count)
        found = [message for message in self.seen if isinstance(message, kind)]
        return found[count - 1]


async def until(condition: Callable[[], bool]) -> None:
    """Lets the loop go on until ``condition`` holds. A wait in vain fails here: pytest's timeout can't end a task."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0)


@pytest.fixture
def pass_time() -> Iterator[Callable[[float], Awaitable[None]]]:
    """Lets so many seconds pass for the running loop, and what was to happen in them happen; however slow the machine
    is, no other time passes from the first call to the end of the test."""
    passed, frozen = 0.0, True

    async def skip(seconds: float) -> None:
        nonlocal passed
        loop = asyncio.get_running_loop()
        if not passed:
            clock = loop.time
            began = clock()
            loop.time = lambda: (began if frozen else clock()) + passed  # type: ignore[method-assign]
        for more in (seconds, 0.0):
            for _ in range(50):
                await asyncio.sleep(0)
            passed += more

    yield skip
    # what ends the test may need some, and a clock never goes back
    frozen = False


async def start_service(settings: Settings, path: str, **model: Any) -> Service:
    """``model`` replaces what the fake worker says of its model, by name."""
    fake = FakeWorker()
    client = WorkerClient()
    app = create_app(settings, client)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    http = httpx.AsyncClient(transport=transport, base_url="http://test")
    service = Service(app, client, fake, http, settings)
    loop = asyncio.get_running_loop()

    def work(frame: bytes) -> None:
        for request in m.decode_requests(frame):
            service.answer(*fake.handle(request))

    def send(frame: bytes) -> None:
        service.frames.append(len(m.decode_requests(frame)))
        loop.call_soon(work, frame)

    client.attach(send, 0.0)
    client.received([m.Ready(msgspec.structs.replace(model_info(path), **model), pid=1)], 0.0)
    await client.settled.wait()
    return service


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(store="disk:///nowhere", max_update_tokens=400, spool_dir=tmp_path / "spool")


@pytest.fixture
async def service(settings: Settings, model_dir: Path) -> AsyncIterator[Service]:
    service = await start_service(settings, str(model_dir))
    async with service.http:
        yield service


@pytest.fixture
async def bare(settings: Settings, tmp_path: Path) -> AsyncIterator[Service]:
    """A service whose checkpoint has no tokenizer."""
    service = await start_service(settings, str(tmp_path))
    async with service.http:
        yield service
