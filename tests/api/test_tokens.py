"""What becomes of text before it is sent to the worker: the checkpoint's tokens, without its tokenizer's own BOS."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from app.api.tokens import PIECE_CHARS, Tokenizer
from app.messages import Generate, Score, Update
from tests.api.conftest import Service

pytestmark = pytest.mark.anyio

BOS = 0
TEXT = "Maya teaches the cello."


def test_no_piece_of_a_text_begins_with_the_tokenizers_bos(tokenizer: Tokenizer, model_dir: Path) -> None:
    own = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json")).encode(TEXT).ids
    assert own == [BOS, *tokenizer.ids(TEXT)]
    long = tokenizer.encode("She lives in Lisbon. " * (3 * PIECE_CHARS // 21))
    assert BOS not in long.tokens
    assert len(long.tokens) == len(long.starts)


async def test_no_text_reaches_the_worker_with_a_bos(service: Service) -> None:
    for path, body in (
        ("/update", {"text": TEXT}),
        ("/update", {"messages": [{"role": "user", "content": TEXT}]}),
        ("/generate", {"prompt": TEXT}),
        ("/generate", {"messages": [{"role": "user", "content": TEXT}]}),
        ("/score", {"prompt": "Maya teaches", "continuation": " the cello."}),
        ("/score", {"prompt": "in Lis", "continuation": "bon."}),
    ):
        assert (await service.post(path, {"tenant": "alice", **body})).status_code == 200
    sent: list[list[int]] = []
    for message in service.seen:
        if isinstance(message, Update):
            sent += [context.tokens for context in message.contexts]
        elif isinstance(message, Generate):
            sent.append(message.tokens)
        elif isinstance(message, Score):
            sent += [message.prompt, message.continuation]
    assert len(sent) >= 8
    assert all(tokens and BOS not in tokens for tokens in sent)
