"""Scores: log-probabilities by pieces are those of all rows at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.memory.arena import Memory, View
from app.worker import sequence as sequences
from app.worker.rows import Rows
from app.worker.sequence import Sequence, begin

VOCAB, ROWS = 50, 23


def scoring() -> Sequence:
    view = View(0, torch.zeros(1, 1))
    memory = Memory("ada", 1, 0, 0, None, torch.zeros(1, 1), view)
    return begin("a", memory, view, [1], [], torch.zeros(1), has_bos=False, prompt_position=0)


def test_cache_rows_are_at_hand_as_numbers() -> None:
    """A step takes one for each sequence that decodes: out of the tensor that costs more than all else about it."""
    view = View(0, torch.zeros(1, 1))
    memory = Memory("ada", 1, 0, 0, torch.zeros(1), torch.zeros(1, 1), view)
    pages, rows = Rows(64).take(20)
    sequence = begin("a", memory, view, [1], pages, rows, has_bos=True, prompt_position=9)
    assert sequence.rows == [0, *range(1, 33)] == sequence.table.tolist()


@pytest.mark.parametrize("piece", [1, 5, 23, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_come_in_pieces_and_by_one_transfer(
    monkeypatch: pytest.MonkeyPatch, piece: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = (4 * torch.randn(ROWS, VOCAB, generator=generator)).to(dtype)
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    likelihoods = rows.float().log_softmax(dim=-1)
    own, greedy = likelihoods[torch.arange(ROWS), targets].tolist(), likelihoods.argmax(dim=-1).tolist()
    sizes: list[int] = []
    transfers: list[torch.Size] = []
    softmax, bring, sequence = Tensor.log_softmax, Tensor.tolist, scoring()

    def noted(some: Tensor, dim: int) -> Tensor:
        sizes.append(some.shape[0])
        return softmax(some, dim=dim)

    def brought(found: Tensor) -> object:
        transfers.append(found.shape)
        return bring(found)

    monkeypatch.setattr(sequences, "_PIECE", piece)
    monkeypatch.setattr(Tensor, "log_softmax", noted)
    monkeypatch.setattr(Tensor, "tolist", brought)
    sequence.score(targets[:9], rows[:9])
    sequence.score(targets[9:], rows[9:])
    monkeypatch.undo()
    assert max(sizes) <= piece
    assert transfers == [(2, 9), (2, ROWS - 9)]
    assert sequence.logprobs == pytest.approx(own, abs=1e-6)
    assert sequence.greedy == greedy
    assert all(type(token) is int for token in sequence.greedy)
