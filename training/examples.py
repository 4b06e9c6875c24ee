"""What a group of contexts is made of: their tokens, the rows that ask for them, and both as batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.facts import Claim

NO_LOSS, TEXT, ANSWER, UNKNOWN = 0, 1, 2, 3  # the kinds of tokens of a row; UNKNOWN: of an "I don't know"
Key = tuple[str, str | None]


@dataclass(frozen=True)
class GroupShape:
    """How a group is drawn. The shares are probabilities; `facts` are the shares of 1, 2 and 3 facts a context.

    `unknown` is the share of rows with a question nothing answers, `untold` that of groups whose contexts are not
    written, so that nothing answers any question.
    """

    contexts: int
    facts: tuple[float, float, float] = (0.5, 0.3, 0.2)
    colliding: float = 0.6
    first_person: float = 0.12
    cross: float = 0.5
    in_prompt: float = 0.0
    running_text: float = 0.0
    changed: float = 0.0
    unknown: float = 0.0
    untold: float = 0.0


@dataclass
class Example:
    """One context and its row of questions: `told_in[i]` is the context of the group that token i of the row is an
    answer from, -1 for all other tokens."""

    context: list[int]
    row: list[int]
    kinds: list[int]
    told_in: list[int]
    claims: list[Claim] = field(default_factory=list)

    @property
    def keys(self) -> frozenset[Key]:
        """What the context speaks of."""
        return frozenset(claim.key for claim in self.claims)


@dataclass
class Group:
    """Examples that share a pool; `told` is False if their contexts are not to be written into it."""

    examples: list[Example]
    told: bool = True

    @property
    def keys(self) -> frozenset[Key]:
        """What its contexts speak of."""
        return frozenset().union(*(example.keys for example in self.examples))


def batch_contexts(contexts: Sequence[Sequence[int]], min_tokens: int) -> tuple[Tensor, Tensor]:
    """Right-align contexts: ids int64 [B, Q] with Q >= min_tokens, lengths int64 [B]."""
    width = max(min_tokens, -(-max(len(c) for c in contexts) // 4) * 4)
    ids: NDArray[np.int64] = np.zeros((len(contexts), width), dtype=np.int64)
    for index, context in enumerate(contexts):
        ids[index, width - len(context) :] = context
    # a copy, on the default device
    return torch.tensor(ids), torch.tensor([len(c) for c in contexts])


def batch_rows(
    rows: Sequence[Sequence[int]], kinds: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Left-align rows: ids and kinds, int64 [B, T], and lengths, int64 [B]."""
    width = -(-max(len(r) for r in rows) // 4) * 4
    both: NDArray[np.int64] = np.zeros((2, len(rows), width), dtype=np.int64)
    for index, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
        both[0, index, : len(row)] = row
        both[1, index, : len(kind)] = kind
    ids, labels = torch.tensor(both)
    return ids, labels, torch.tensor([len(r) for r in rows])
