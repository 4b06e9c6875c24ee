"""A generation or a score while it runs: its tokens, the view of memory it reads, its cache rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.memory.arena import Memory, View
from app.model.sampling import Sampler

_PIECE = 128
"""Rows of logits whose likelihoods exist at once: of all of a step's, in float32, they could take gigabytes."""


@dataclass(eq=False)
class Sequence:
    """``tokens`` are prompt and completion so far; ``computed`` of them have K/V in the cache.

    ``table`` int64 [bos + room] names the cache rows in order, and ``rows`` the same as numbers: taking one out of a
    tensor at every step takes longer than all else that a step does about a sequence. ``scored`` counts the trailing
    tokens whose log-probabilities are wanted (scores only).
    """

    id: str
    memory: Memory
    view: View
    tokens: list[int]
    prompt: int
    pages: list[int]
    table: Tensor
    rows: list[int]
    first_position: int
    bos: int
    sampler: Sampler | None = None
    max_tokens: int = 0
    stop_tokens: frozenset[int] = frozenset()
    scored: int = 0
    computed: int = 0
    logprobs: list[float] = field(default_factory=list)
    greedy: list[int] = field(default_factory=list)

    @property
    def produced(self) -> int:
        return len(self.tokens) - self.prompt

    def score(self, targets: Tensor, rows: Tensor) -> None:
        """Notes the log-probabilities of ``targets`` [T] by their logits ``rows`` [T, vocab]. Waits for the device."""
        found = []
        pieces = torch.split(rows, _PIECE), torch.split(targets.to(rows.device), _PIECE)
        for piece, wanted in zip(*pieces, strict=True):
            likelihoods = piece.float().log_softmax(dim=-1)
            own = likelihoods.gather(1, wanted[:, None])[:, 0]
            # a double holds both as they are, so that one transfer brings all
            found.append(torch.stack([own.double(), likelihoods.argmax(dim=-1).double()]))
        logprobs, greedy = torch.cat(found, dim=1).tolist()
        self.logprobs += logprobs
        self.greedy += map(int, greedy)


def begin(
    job_id: str,
    memory: Memory,
    view: View,
    tokens: list[int],
    pages: list[int],
    rows: Tensor,
    *,
    has_bos: bool,
    prompt_position: int,
) -> Sequence:
    """A sequence at its first token. Behind a memory that is not initialised there is no bos and no pool."""
    bos = int(has_bos and memory.initialized)
    table = torch.cat([torch.zeros(bos, dtype=torch.int64), rows])
    return Sequence(
        id=job_id,
        memory=memory,
        view=view,
        tokens=tokens,
        prompt=len(tokens),
        pages=pages,
        table=table,
        rows=table.tolist(),
        first_position=prompt_position if memory.initialized else 0,
        bos=bos,
    )
