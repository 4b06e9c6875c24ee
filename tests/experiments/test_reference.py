"""The comparison with the official implementation, with a stand-in for it: it must not time what differs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import random_checkpoint, reference
from experiments.reference import Disagreement, Ours, Round, Theirs, agree, measure, table

SHAPE = random_checkpoint.shape(
    layers=2, hidden=32, heads=4, kv_heads=2, intermediate=48, vocab=64, num_blocks=3, num_tokens=8
)
PROMPT, CONTEXT = [5, 9, 3, 7], list(range(10, 42))


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ours]:
    monkeypatch.setattr(reference, "SHAPE", SHAPE)
    random_checkpoint.write(tmp_path / "checkpoint", SHAPE, seed=3)
    ours = Ours(tmp_path / "checkpoint", tmp_path / "store", threads=2)
    yield ours
    ours.close()


class Echo:
    """Answers as the official side would if it computed what a second engine of ours computes."""

    def __init__(self, twin: Ours) -> None:
        self.twin = twin
        self.shift = 0
        self.lie = 0.0

    def generate(self, prompt: list[int], count: int, want_logits: bool = False) -> dict[str, Any]:
        tokens, times, top = self.twin.generate(prompt, count, logprobs=reference.COMPARED)
        logits = [[-50.0] * SHAPE.vocab_size for _ in top]
        for row, likeliest in zip(logits, top, strict=True):
            for token, value in likeliest:
                row[token] = value + self.lie
        tokens = [(t + self.shift) % SHAPE.vocab_size for t in tokens]
        return {"tokens": tokens, "times": times, "logits": logits}

    def update(self, context: list[int], want_block: bool = False) -> dict[str, Any]:
        seconds = self.twin.update(context)
        return {"seconds": seconds, "block": self.twin.block().tolist() if want_block else []}


@pytest.fixture
def echo(ours: Ours, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Echo]:
    # the likeliest of all 64 tokens, so that their log-probabilities are logits
    monkeypatch.setattr(reference, "COMPARED", SHAPE.vocab_size)
    twin = Ours(tmp_path / "checkpoint", tmp_path / "twin", threads=2)
    yield Echo(twin)
    twin.close()


def test_agreement_then_rounds(ours: Ours, echo: Any) -> None:
    assert agree(ours, echo, PROMPT, CONTEXT) < reference.TOLERANCE
    own, other = measure(ours, echo, PROMPT, CONTEXT, rounds=2)
    assert len(own.first) == len(other.decode) == len(own.update) == 2
    assert all(seconds > 0 for seconds in own.first + own.decode + own.update)


def test_other_tokens_are_refused(ours: Ours, echo: Any) -> None:
    echo.shift = 1
    with pytest.raises(Disagreement, match="tokens"):
        agree(ours, echo, PROMPT, CONTEXT)
    with pytest.raises(Disagreement, match="tokens"):
        measure(ours, echo, PROMPT, CONTEXT, rounds=1)


def test_another_block_is_refused(ours: Ours, echo: Any) -> None:
    echo.twin.update(CONTEXT[::-1])
    with pytest.raises(Disagreement, match="blocks"):
        agree(ours, echo, PROMPT, CONTEXT)


def test_other_log_probabilities_are_refused(ours: Ours, echo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "COMPARED", 2)
    with pytest.raises(Disagreement, match="log-probabilities"):
        agree(ours, echo, PROMPT, CONTEXT)


def test_a_checkout_that_is_none_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="modeling_memoryllm"):
        Theirs(sys.executable, tmp_path, tmp_path, threads=1, attention="sdpa")


def test_table() -> None:
    text = table(Round([0.1, 0.3, 0.2], [0.01], [1.0]), Round([1.0, 0.8, 1.2], [0.05], [2.0]))
    assert "| first token, 32-token prompt | 200 ms (100 ms) | 1,000 ms (800 ms) | 5.0 | 8.0 |" in text
