"""Prompts that one step reads together, of equal lengths and of others, against each in a step of its own."""

from __future__ import annotations

import torch

from app.memory.arena import Arena, Memory, View
from app.worker.rows import Rows
from app.worker.runner import ReadChunk, Runner
from app.worker.sequence import Sequence, begin
from tests.harness import load_backbone


def test_a_prompt_reads_the_same_whatever_is_beside_it() -> None:
    backbone = load_backbone("plain")[0]
    config = backbone.config
    arena, rows = Arena(backbone, 6, 6), Rows(257)
    runner = Runner(backbone, arena, 257, 8)
    generator = torch.Generator().manual_seed(1)
    sequences: list[Sequence] = []
    for number, length in enumerate([5, 3, 5, 1, 5, 3]):
        hidden = torch.randn(config.num_layers, config.pool_size, config.hidden_size, generator=generator)
        slot, hot = arena.take_slot(), arena.take_hot()
        assert slot is not None
        assert hot is not None
        view = View(0, arena.project(slot, hidden, lambda layer: layer), readers=1)
        arena.build_hot(slot, view.rank, hot)
        born = torch.zeros(config.num_layers, config.pool_size, dtype=torch.int32)
        memory = Memory(f"t{number}", 0, slot, 0, hidden[:, -config.num_tokens :], born, view)
        arena.settle(memory)
        arena.settle_hot(memory, view, hot)
        tokens = torch.randint(config.vocab_size, (length + 2,), generator=generator).tolist()
        pages, table = rows.take(length + 2)
        sequences.append(
            begin(
                f"{number}",
                memory,
                view,
                tokens,
                pages,
                table,
                has_bos=config.add_bos_embedding,
                prompt_position=config.prompt_position,
            )
        )
    # all but two tokens each, then these two beside each other: of chunks alike some have read more before
    for start, count in ((0, None), (None, 2)):
        chunks = []
        for sequence in sequences:
            first = len(sequence.tokens) - 2 if start is None else start
            chunks.append(ReadChunk(sequence, first, count or len(sequence.tokens) - 2))
        runner.step([], chunks, [])
    # of the last page what is behind the tokens holds whatever lay there before
    read = [s.table[: s.bos + len(s.tokens)] for s in sequences]
    together = [runner.cache.key[:, table].clone() for table in read]
    stepped = runner.step([], [ReadChunk(s, 0, len(s.tokens)) for s in sequences], [])
    assert stepped.sequences == sequences
    for sequence, table, beside, cached in zip(sequences, read, stepped.logits, together, strict=True):
        [alone] = runner.step([], [ReadChunk(sequence, 0, len(sequence.tokens))], []).logits
        torch.testing.assert_close(beside, alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cached, runner.cache.key[:, table], atol=1e-5, rtol=1e-5)
