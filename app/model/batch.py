"""What one forward pass works on: rows of reads, then rows of self-updates, and where each finds its keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from app.model.config import ModelConfig

if TYPE_CHECKING:
    from app.model.operations import Attend


@dataclass(frozen=True)
class ContextCache:
    """K (rotated) and V of prompts and completions, a row a token: each [L, rows, H_kv, d_head].

    Row 0 holds the bos embedding of each layer and is shared by all sequences.
    """

    key: Tensor
    value: Tensor

    @classmethod
    def allocate(
        cls, config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device
    ) -> ContextCache:
        shape = (config.num_layers, rows, config.num_kv_heads, config.head_dim)
        # row 0 stands in for absent rows of shorter sequences, so it must be finite even without a bos
        key, value = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        key[:, 0] = 0
        value[:, 0] = 0
        return cls(key, value)


# not frozen: one is made for each sequence at every step, which would take twice as long
@dataclass(slots=True)
class Reading:
    """Consecutive query rows of one sequence, and what they read.

    ``hot`` and ``slot`` name its pool (None: the memory is not initialised). ``table`` int64 (on the host) are the
    sequence's cache rows in order, the same tensor at every step; the last of ``rows`` sees the first ``seen`` of
    them, each row before it one less.
    """

    rows: slice
    hot: int | None
    slot: int | None
    table: Tensor
    seen: int


class SelfUpdate:
    """A self-update in progress: its context's K/V so far, and the block it is writing.

    ``tail`` [L, K, d] is the newest block (None if the memory is not initialised), ``length`` T the tokens of
    the context. ``bos``: K, V, each [L, H_kv, d_head]. It takes no memory of its own before its first chunk does.
    """

    def __init__(
        self,
        config: ModelConfig,
        tail: Tensor | None,
        length: int,
        like: Tensor,
        bos: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        if tail is None and length < config.num_tokens:
            raise ValueError("a memory that is not initialised takes contexts of at least K tokens")
        self.tail = tail
        self.length = length
        self.done = 0
        self.prefix = 0 if tail is None else config.num_tokens + config.first_rank_position
        self.tail_length = 0 if tail is None else config.num_tokens
        self.short = max(0, config.num_tokens - length)
        self._config, self._like, self._bos = config, like, bos
        self._kept: tuple[Tensor, Tensor] | None = None
        self._block: Tensor | None = None

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """K, V of bos, tail and context, each [L, H_kv, rows, d_head]: what later chunks need."""
        if self._kept is None:
            config, rows = self._config, self.prefix + self.length
            shape = (config.num_layers, config.num_kv_heads, rows, config.head_dim)
            self._kept = self._new(shape), self._new(shape)
            for part, bos in zip(self._kept, self._bos or (), strict=False):
                part[:, :, 0] = bos
        return self._kept

    @property
    def block(self) -> Tensor:
        """[L, K, d], whole once the update is finished."""
        if self._block is None:
            config = self._config
            self._block = self._new((config.num_layers, config.num_tokens, config.hidden_size))
        return self._block

    @property
    def bytes(self) -> int:
        """What it has taken so far."""
        return sum(part.nbytes for part in (*(self._kept or ()), self._block) if part is not None)

    def _new(self, shape: tuple[int, ...]) -> Tensor:
        # a block is worked on outside of the pass that it comes from
        with torch.inference_mode(False):
            return self._like.new_empty(shape)

    @property
    def finished(self) -> bool:
        return self.done == self.length


@dataclass(frozen=True)
class UpdateSpan:
    """``count`` context rows of ``update`` from ``start`` on, at ``rows`` of the batch.

    ``tail_rows`` are the batch's rows of the tail, in the first chunk only. Of a context shorter than K the
    last ``update.short`` of those are queries as well; their outputs stand at ``tail_outputs``.
    """

    update: SelfUpdate
    rows: slice
    start: int
    count: int
    tail_rows: slice | None = None
    tail_outputs: slice | None = None


@dataclass
class Batch:
    """One forward pass. Rows: decode, prompt spans, update spans; the tails of new updates behind them.

    ``tokens`` int64 [reads + updates]; ``positions`` int64 of all rows, tails included; ``write_rows`` [reads]
    cache rows for the reads' K/V; ``logit_rows`` the rows whose logits are wanted; ``attend`` the reads' attention
    (None: there are no reads).
    """

    tokens: Tensor
    positions: Tensor
    write_rows: Tensor
    logit_rows: Tensor
    attend: Attend | None = None
    updates: list[UpdateSpan] = field(default_factory=list)

    @property
    def reads(self) -> int:
        return self.write_rows.shape[0]
