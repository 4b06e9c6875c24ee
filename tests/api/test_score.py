"""POST /score: which tokens are scored, and what is said of them."""

from __future__ import annotations

import asyncio

import pytest

from app.api.tokens import Tokenizer
from app.messages import Cancel, Score
from tests.api.conftest import Service
from tests.api.test_generate import read_body

pytestmark = pytest.mark.anyio


async def test_answer(bare: Service) -> None:
    body = {"tenant": "alice", "prompt": [7, 8], "continuation": [4, 5, 6]}
    response = await bare.post("/score", body)
    assert response.json() == {
        "tenant": "alice",
        "logprobs": [0.0, -1.0, -2.0],
        "greedy": [True, False, True],
        "greedy_token_ids": [4, 4, 6],
        "token_ids": [4, 5, 6],
        "memory_version": 0,
    }
    (sent,) = bare.seen
    assert isinstance(sent, Score)
    assert (sent.tenant, sent.prompt, sent.continuation) == ("alice", [7, 8], [4, 5, 6])
    assert sent.deadline is not None


async def test_strings_are_tokenised_together_where_a_token_ends_between_them(
    service: Service, tokenizer: Tokenizer
) -> None:
    await service.post("/score", {"tenant": "alice", "prompt": "She lives in", "continuation": " Lisbon"})
    # "Lis" + "bon" is one token, so that the two are tokenised apart
    await service.post("/score", {"tenant": "alice", "prompt": "in Lis", "continuation": "bon."})
    whole, apart = service.seen
    assert isinstance(whole, Score)
    assert isinstance(apart, Score)
    assert whole.prompt + whole.continuation == tokenizer.ids("She lives in Lisbon")
    assert tokenizer.ids("in Lisbon.")[: len(apart.prompt)] != apart.prompt
    assert (apart.prompt, apart.continuation) == (tokenizer.ids("in Lis"), tokenizer.ids("bon."))


async def test_string_and_ids(service: Service, tokenizer: Tokenizer) -> None:
    body = {"tenant": "alice", "prompt": "She lives in", "continuation": [5]}
    assert (await service.post("/score", body)).status_code == 200
    (sent,) = service.seen
    assert isinstance(sent, Score)
    assert (sent.prompt, sent.continuation) == (tokenizer.ids("She lives in"), [5])


async def test_a_client_that_goes_ends_its_score(service: Service) -> None:
    body = {"tenant": "mute", "prompt": [5], "continuation": [6]}
    call, gone, _ = await read_body(service, body, "/score")
    message = await service.until_seen(Score)
    gone.set()
    cancel = await service.until_seen(Cancel)
    assert isinstance(message, Score)
    assert isinstance(cancel, Cancel)
    assert cancel.id == message.id
    await asyncio.wait_for(call, 10)
