"""Self-updates of equal length that one step takes whole, against each in a step of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.memory.arena import Arena
from app.model.backbone import Backbone
from app.model.updates import alike_updates
from app.worker.runner import Runner, UpdateChunk
from tests.harness import load_backbone


@pytest.fixture(scope="module", params=["plain", "two-adapters"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return load_backbone(request.param)[0]


def blocks(backbone: Backbone, runner: Runner, contexts: list[tuple[Tensor, list[int]]]) -> list[Tensor]:
    """Of updates (tail, tokens) that are taken in one step."""
    chunks = [UpdateChunk(backbone.begin_update(tail, len(tokens)), 0, tokens) for tail, tokens in contexts]
    runner.step([], [], chunks)
    assert all(chunk.update.finished for chunk in chunks)
    return [chunk.update.block for chunk in chunks]


def in_two_steps(backbone: Backbone, runner: Runner, tail: Tensor, tokens: list[int]) -> Tensor:
    update = backbone.begin_update(tail, len(tokens))
    for part in (slice(0, 2), slice(2, len(tokens))):
        runner.step([], [], [UpdateChunk(update, part.start, tokens[part])])
    return update.block


def test_a_block_is_the_same_whatever_is_beside_it(backbone: Backbone) -> None:
    config = backbone.config
    runner = Runner(backbone, Arena(backbone, 1, 1), 64, 4)
    generator = torch.Generator().manual_seed(1)
    shape = (config.num_layers, config.num_tokens, config.hidden_size)
    k = config.num_tokens
    few = max(1, k - 2)
    lengths = [k + 3, k, k + 3, few, k + 1, 1, k + 3, few, k, few]
    contexts = [
        (
            torch.randn(shape, generator=generator),
            torch.randint(config.vocab_size, (n,), generator=generator).tolist(),
        )
        for n in lengths
    ]
    together = blocks(backbone, runner, contexts)
    for context, block in zip(contexts, together, strict=True):
        [alone] = blocks(backbone, runner, [context])
        torch.testing.assert_close(block, alone, atol=1e-5, rtol=1e-5)
        if len(context[1]) >= k:
            torch.testing.assert_close(block, in_two_steps(backbone, runner, *context), atol=1e-5, rtol=1e-5)
        assert block.untyped_storage().nbytes() == block.nbytes, "a block keeps nobody else's in memory"


def test_an_update_takes_memory_when_its_first_chunk_does(backbone: Backbone) -> None:
    """None while it waits; a block alone where nothing is kept for a later chunk."""
    config = backbone.config
    runner = Runner(backbone, Arena(backbone, 1, 1), 64, 4)
    tail = torch.zeros(config.num_layers, config.num_tokens, config.hidden_size)
    tokens = [1] * (config.num_tokens + 3)
    whole, parted = (backbone.begin_update(tail, len(tokens)) for _ in range(2))
    assert whole.bytes == parted.bytes == 0
    runner.step([], [], [UpdateChunk(whole, 0, tokens)])
    assert whole.bytes == whole.block.nbytes == tail.nbytes
    assert not whole.block.is_inference()
    runner.step([], [], [UpdateChunk(parted, 0, tokens[:2])])
    rows = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    assert parted.bytes >= tail.nbytes + rows * (config.num_tokens + len(tokens))


def test_whole_updates_of_equal_length_are_found(backbone: Backbone) -> None:
    config = backbone.config
    k = config.num_tokens
    runner = Runner(backbone, Arena(backbone, 1, 1), 64, 4)
    tail = torch.zeros(config.num_layers, k, config.hidden_size)

    def chunk(length: int, start: int = 0, count: int | None = None) -> UpdateChunk:
        tokens = [1] * (length - start if count is None else count)
        return UpdateChunk(backbone.begin_update(tail, length), start, tokens)

    chunks = [chunk(k + 2), chunk(k + 9, 0, k + 2), chunk(k), chunk(k - 1), chunk(k + 2), chunk(k + 9, k + 2)]
    alike, loose = alike_updates(runner._update_spans(chunks, [], []))
    # a part of as many tokens stands between two whole ones
    assert sorted(len(spans) for spans in alike) == [1, 1, 1, 1]
    assert sorted((span.start, span.count) for span in loose) == [(0, k + 2), (k + 2, 7)]
    alike, loose = alike_updates(runner._update_spans([chunk(k + 1), chunk(k), chunk(k + 1)], [], []))
    assert [[span.count for span in spans] for spans in alike] == [[k], [k + 1, k + 1]]
    assert not loose
    alike, loose = alike_updates(runner._update_spans([chunk(k - 1), chunk(1), chunk(k - 1)], [], []))
    assert [[span.count for span in spans] for spans in alike] == [[1], [k - 1, k - 1]]
    assert not loose
