"""Self-updates of equal length that a step takes from their first token to their last: one batched product.

Nothing of theirs needs to be kept for a later chunk.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from app.model.batch import UpdateSpan
from app.model.config import ModelConfig
from app.model.operations import Operations


def alike_updates(spans: list[UpdateSpan]) -> tuple[list[list[UpdateSpan]], list[UpdateSpan]]:
    """Whole updates of equal length whose rows lie side by side, together; and the spans that are none of these."""
    alike: list[list[UpdateSpan]] = []
    loose: list[UpdateSpan] = []
    for length, run in groupby(spans, key=_whole_length):
        if length is None:
            loose += run
        else:
            alike.append(list(run))
    return alike, loose


def _whole_length(span: UpdateSpan) -> int | None:
    """The length of an update that is all here; None for parts and for first blocks."""
    whole = span.start == 0 and span.count == span.update.length
    return span.count if whole and span.tail_rows is not None else None


class WholeUpdates:
    """``spans`` of T tokens each, neighbours in the batch as their tails are, and as what is asked of these if T < K.
    ``bos``: K, V, each [L, H_kv, d_head]."""

    def __init__(
        self, config: ModelConfig, spans: list[UpdateSpan], bos: tuple[Tensor, Tensor] | None
    ) -> None:
        first, last = spans[0], spans[-1]
        assert first.tail_rows is not None
        assert last.tail_rows is not None
        self._spans, self._bos = spans, bos
        self._rows = slice(first.rows.start, last.rows.stop)
        self._tails = slice(first.tail_rows.start, last.tail_rows.stop)
        self._short, self._outputs = first.update.short, slice(0, 0)
        if first.tail_outputs is not None and last.tail_outputs is not None:
            self._outputs = slice(first.tail_outputs.start, last.tail_outputs.stop)
        assert first.update.tail is not None
        shape = (config.num_layers, len(spans), config.num_tokens, config.hidden_size)
        self._blocks = first.update.tail.new_empty(shape)

    def attend(
        self, operations: Operations, layer: int, query: Tensor, key: Tensor, value: Tensor, out: Tensor
    ) -> None:
        """Context rows, and the last of the tail if there are few of them, over bos, tail and context, causally."""
        queries = self._apart(query[self._rows])
        if self._short:
            queries = torch.cat([self._apart(query[self._tails])[:, -self._short :], queries], dim=1)
        keys, values = (self._lying(layer, index, rows) for index, rows in enumerate((key, value)))
        attended = operations.attend_causally(queries, keys, values)
        out[self._rows] = attended[:, self._short :].flatten(0, 1)
        if self._short:
            out[self._outputs] = attended[:, : self._short].flatten(0, 1)

    def _lying(self, layer: int, index: int, rows: Tensor) -> Tensor:
        """[B, H_kv, bos + K + T, d_head] of the batch's K (``index`` 0) or V (1)."""
        count = len(self._spans)
        parts = [self._apart(rows[each]) for each in (self._tails, self._rows)]
        if self._bos is not None:
            bos = self._bos[index][layer]
            parts.insert(0, bos.expand(count, 1, *bos.shape))
        return torch.cat(parts, dim=1).transpose(1, 2)

    def _apart(self, rows: Tensor) -> Tensor:
        """[B * T, ...] -> [B, T, ...]."""
        return rows.view(len(self._spans), -1, *rows.shape[1:])

    def collect(self, layer: int, x: Tensor) -> None:
        """Notes the layer's last K output rows of each tail and context: its new memory tokens."""
        block, outputs = self._blocks[layer], self._apart(x[self._rows])
        block[:, self._short :] = outputs[:, self._short - block.shape[1] :]
        if self._short:
            block[:, : self._short] = self._apart(x[self._outputs])

    def finish(self) -> None:
        """Gives each update its block, in memory of its own: a block outlives those beside it."""
        for place, span in enumerate(self._spans):
            span.update.block.copy_(self._blocks[:, place])
