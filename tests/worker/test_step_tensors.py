"""What the runner makes of a step."""

from __future__ import annotations

import torch

from app.worker.rows import Rows
from app.worker.runner import ReadChunk, UpdateChunk
from app.worker.sequence import Sequence, begin
from tests.harness import Harness, load_backbone


def test_a_steps_numbers_go_to_the_device_in_one_copy() -> None:
    harness = Harness(load_backbone("two-adapters")[0])
    harness.update("ada", list(range(20, 40)))
    engine = harness.engine
    memory, config = engine.residency.get("ada"), engine.backbone.config
    assert memory is not None
    rows = Rows(200)

    def sequence(name: str, length: int) -> Sequence:
        pages, taken = rows.take(length + 1)
        return begin(
            name,
            memory,
            memory.view,
            list(range(5, 5 + length)),
            pages,
            taken,
            has_bos=config.add_bos_embedding,
            prompt_position=config.prompt_position,
        )

    decoding, prompt = sequence("a", 4), sequence("b", 7)
    decoding.computed = 3
    update = UpdateChunk(engine.backbone.begin_update(memory.tail, 20), 0, list(range(60, 80)))
    batch, wanted, _ = engine.runner._batch([decoding], [ReadChunk(prompt, 0, 7)], [update])
    assert wanted == [decoding, prompt]
    first, n = config.prompt_position, config.num_tokens
    assert batch.tokens.tolist() == [8, *range(5, 12), *range(60, 80)]
    context = range(update.update.prefix, update.update.prefix + 20)
    tail = range(config.first_rank_position, config.first_rank_position + n)
    assert batch.positions.tolist() == [first + 3, *range(first, first + 7), *context, *tail]
    assert batch.write_rows.tolist() == [decoding.rows[4], *prompt.rows[1:8]]
    assert batch.logit_rows.tolist() == [0, 7]
    lists = batch.tokens, batch.positions, batch.write_rows, batch.logit_rows
    assert {each.dtype for each in lists} == {torch.int64}
    assert len({each.untyped_storage().data_ptr() for each in lists}) == 1
