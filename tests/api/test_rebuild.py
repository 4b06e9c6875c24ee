"""POST /tenants/{tenant}/rebuild: texts become contexts of today's tokenizer, and progress is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.api.tokens import Tokenizer
from app.messages import KeptText, RebuildTenant, Update
from tests.api.conftest import Service
from tests.api.fake_worker import MAX_CONTEXT, MIN_CONTEXT, NUM_TOKENS
from tests.api.test_bad_input import check_error

pytestmark = pytest.mark.anyio

LONG = "The quick brown fox jumps over the lazy dog. It never rains in Lisbon, says Maya.  \n" * 4


def sent(service: Service) -> RebuildTenant:
    return next(message for message in reversed(service.seen) if isinstance(message, RebuildTenant))


async def kept(service: Service, *texts: str) -> None:
    """The foreign tenant's texts, as many updates."""
    service.fake.memories["foreign"] = 9
    service.fake.texts = [KeptText(number, 7, text) for number, text in enumerate(texts, 1)]


async def test_texts_are_cut_as_updates_are(service: Service) -> None:
    await kept(service, LONG, "Lisbon", "It never rains in Lisbon.")
    answer = await service.post("/tenants/foreign/rebuild", {})
    assert answer.status_code == 200
    told = answer.json()
    contexts = sent(service).contexts
    assert (told["rebuilt"], told["blocks"], told["lineage"]) == (True, len(contexts), 1)
    assert told["tokens"] == sum(len(context.tokens) for context in contexts)
    expected = []
    for number, text in enumerate((LONG, "Lisbon", "It never rains in Lisbon."), 1):
        await service.post("/update", {"tenant": "fresh", "text": text, "short": "repeat"})
        update = service.seen[-1]
        assert isinstance(update, Update)
        expected += [(context.tokens, context.text, number) for context in update.contexts]
    assert [(c.tokens, c.text, c.memory_version) for c in contexts] == expected
    assert len(expected) > 5
    assert all(MIN_CONTEXT <= len(c.tokens) <= MAX_CONTEXT for c in contexts)


@pytest.mark.parametrize("times", [1, 2, 7])
async def test_what_filled_a_block_fills_one_again(
    service: Service, tokenizer: Tokenizer, times: int
) -> None:
    text = "Maya sings."
    once = tokenizer.ids(text)
    assert MIN_CONTEXT <= len(once) < NUM_TOKENS
    service.fake.memories["foreign"] = 1
    service.fake.texts = [KeptText(1, times * len(once), text)]
    await service.post("/tenants/foreign/rebuild", {})
    (context,) = sent(service).contexts
    assert (context.tokens == once) if times == 1 else (len(context.tokens) >= NUM_TOKENS)
    assert context.text == text


async def test_a_piece_of_a_text_is_told_as_it_was(service: Service, tokenizer: Tokenizer) -> None:
    """White space at a cut was never among a piece's tokens; at the end of a whole text it was."""
    text = "It never rains in Lisbon.  "
    bare, whole = tokenizer.ids(text.rstrip()), tokenizer.ids(text)
    assert len(bare) < len(whole)
    service.fake.memories["foreign"] = 2
    service.fake.texts = [
        KeptText(1, len(bare), text),
        KeptText(2, len(whole), text),
        KeptText(3, len(whole) + 1, text),
    ]
    await service.post("/tenants/foreign/rebuild", {})
    assert [c.tokens for c in sent(service).contexts] == [bare, whole, whole]
    assert [c.text for c in sent(service).contexts] == [text] * 3


async def test_progress_is_streamed(service: Service) -> None:
    await kept(service, LONG)
    answer = await service.post("/tenants/foreign/rebuild", {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [
        (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for name, data in (block.split("\n") for block in answer.text.strip().split("\n\n"))
    ]
    total = len(sent(service).contexts)
    assert [name for name, _ in events] == ["progress"] * total + ["done"]
    assert events[0][1] == {"done": 1, "total": total, "memory_version": 1}
    assert (events[-1][1]["rebuilt"], events[-1][1]["blocks"]) == (True, total)


async def test_a_memory_of_the_served_model_is_left_alone_unless_forced(service: Service) -> None:
    service.fake.memories["alice"] = 2
    told = (await service.post("/tenants/alice/rebuild", {})).json()
    assert (told["rebuilt"], told["memory_version"], told["lineage"]) == (False, 2, 0)
    assert not any(isinstance(message, RebuildTenant) for message in service.seen)
    service.fake.texts = [KeptText(1, 7, LONG)]
    assert (await service.post("/tenants/alice/rebuild", {"force": True})).json()["rebuilt"]


async def test_an_update_meanwhile_makes_it_begin_again(service: Service) -> None:
    await kept(service, LONG)
    service.fake.interrupted = 2
    assert (await service.post("/tenants/foreign/rebuild", {})).json()["rebuilt"]
    service.fake.interrupted = 3
    answer = await service.post("/tenants/foreign/rebuild", {})
    check_error(answer, 409, "version_conflict")
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize("stream", [True, False])
async def test_rebuilds_that_cannot_be(service: Service, bare: Service, stream: bool) -> None:
    body = {"stream": stream}
    service.fake.memories["untold"] = 1
    check_error(await service.post("/tenants/untold/rebuild", body), 409, "texts_not_kept")
    check_error(await service.post("/tenants/nobody/rebuild", body), 404, "tenant_not_found")
    await kept(bare, LONG)
    check_error(await bare.post("/tenants/foreign/rebuild", body), 422, "no_tokenizer")
    bare.fake.texts = []
    assert (await bare.post("/tenants/foreign/rebuild", body)).status_code == 200


@pytest.mark.parametrize("body", [{"force": 1}, {"stream": "true"}, {"model": "x"}, {"force": None}])
async def test_a_wrong_body_never_reaches_the_worker(service: Service, body: dict[str, Any]) -> None:
    check_error(await service.post("/tenants/alice/rebuild", body), 422, "invalid_request")
    assert service.seen == []
