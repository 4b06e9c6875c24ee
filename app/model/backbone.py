"""The forward pass: reads of many pools and self-updates of others, together in one batch.

Linear layers run once over all rows; attention goes to each row's own pool and context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from app.model.batch import Batch, ContextCache, SelfUpdate, UpdateSpan
from app.model.config import ModelConfig
from app.model.operations import MakeOperations
from app.model.pools import Pools
from app.model.rope import RopeTable
from app.model.torch_operations import TorchOperations
from app.model.updates import WholeUpdates, alike_updates
from app.model.weights import Weights
from kernels.linear import linear
from kernels.norm import rms_norm


class Backbone:
    """Holds weights and rotary table; ``max_sequence`` bounds prompt and completion, in tokens.

    ``operations`` makes the form of the memory's operations that suits the device.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        max_sequence: int,
        operations: MakeOperations = TorchOperations,
    ) -> None:
        self.config = config
        self.weights = weights
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        context = 1 + config.num_tokens + max(config.max_context, max_sequence)
        length = config.prompt_position + max(max_sequence, context)
        self.rope = RopeTable(config, length, self.dtype, self.device)
        self.operations = operations(config, self.rope, self.dtype, self.device)
        self._read_bos = self._bos(update=False)
        self._update_bos = self._bos(update=True)

    # ------------------------------------------------------------ projections outside the batch

    def _bos(self, *, update: bool) -> tuple[Tensor, Tensor] | None:
        """K, V of the bos embeddings, each [L, H_kv, d_head]; position 0, so K needs no rotation."""
        if self.weights.bos is None:
            return None
        keys, values = [], []
        for row, layer in zip(self.weights.bos, self.weights.layers, strict=True):
            x = rms_norm(row[None], layer.input_norm, self.config.rms_norm_eps)
            _, key, value = self._split(layer.qkv(x, slice(0, 1) if update else None))
            keys.append(key[0])
            values.append(value[0])
        return torch.stack(keys), torch.stack(values)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, (H + 2 H_kv) d_head] -> Q [rows, H, d_head], K and V [rows, H_kv, d_head]."""
        c = self.config
        heads = qkv.view(qkv.shape[0], c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        query, key, value = heads.split_with_sizes([c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        return query, key, value

    def new_context_cache(self, rows: int) -> ContextCache:
        """A cache of ``rows`` rows whose row 0 is the bos."""
        cache = ContextCache.allocate(self.config, rows, self.dtype, self.device)
        if self._read_bos is not None:
            cache.key[:, 0], cache.value[:, 0] = self._read_bos
        return cache

    def write_memory(
        self,
        hidden: Tensor,
        slots: Tensor,
        key: Tensor,
        value: Tensor,
        bring: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Projects hidden memory [L, T, d] for reading and writes it to ``slots`` int64 [L, T] (on the host)
        of one pool: ``key`` (un-rotated) and ``value`` [L, H_kv, S, d_head].

        ``bring`` takes a layer of hidden memory to the device, in the weights' dtype.
        """
        # of all layers at once: a check and a copy for each would take the host longer than the launches do
        at = self.operations.prepare_slots(slots, key.shape[2])
        for index in range(self.config.num_layers):
            self._write_layer(index, hidden[index], at[index], key[index], value[index], bring)

    def _write_layer(
        self,
        index: int,
        hidden: Tensor,
        slots: Tensor,
        key: Tensor,
        value: Tensor,
        bring: Callable[[Tensor], Tensor] | None,
    ) -> None:
        layer, first_key_row = self.weights.layers[index], self.config.num_heads * self.config.head_dim
        self.operations.write(
            bring(hidden) if bring else hidden.to(self.device, self.dtype),
            layer.input_norm,
            layer.qkv.weight[first_key_row:],
            None if layer.qkv.bias is None else layer.qkv.bias[first_key_row:],
            slots,
            key,
            value,
        )

    def write_blocks(
        self, hidden: Sequence[Tensor], pools: list[int], slots: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """As ``write_memory`` of one block [L, K, d] for each of ``pools``: ``slots`` int64 [B, L, K] (on the host),
        ``key`` (un-rotated) and ``value`` [L, P, H_kv, S, d_head]."""
        first_key_row = self.config.num_heads * self.config.head_dim
        at = self.operations.prepare_slots(slots, key.shape[3])
        blocks = [block.to(self.device, self.dtype) for block in hidden]
        for index, layer in enumerate(self.weights.layers):
            self.operations.write_blocks(
                # a layer at a time: all of many tenants' blocks once more would be gigabytes
                torch.stack([block[index] for block in blocks]),
                layer.input_norm,
                layer.qkv.weight[first_key_row:],
                None if layer.qkv.bias is None else layer.qkv.bias[first_key_row:],
                pools,
                at[:, index],
                key[index],
                value[index],
            )

    def project(
        self, hidden: Tensor, bring: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden memory [L, T, d] -> K (un-rotated), V, each [L, H_kv, T, d_head], for reading."""
        c = self.config
        layers, tokens = hidden.shape[:2]
        shape = (layers, c.num_kv_heads, tokens, c.head_dim)
        key, value = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        self.write_memory(hidden, torch.arange(tokens).expand(layers, tokens), key, value, bring)
        return key, value

    def project_by_layer(
        self, hidden: Tensor, bring: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """As ``project``, of a pool that is not to be on the device whole: the layer, as a slice, and its K and V
        [1, H_kv, T, d_head], which the next layer overwrites."""
        c, tokens = self.config, hidden.shape[1]
        shape = (1, c.num_kv_heads, tokens, c.head_dim)
        key, value = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        slots = self.operations.prepare_slots(torch.arange(tokens), tokens)
        for index in range(c.num_layers):
            self._write_layer(index, hidden[index], slots, key[0], value[0], bring)
            yield slice(index, index + 1), key, value

    def begin_update(self, tail: Tensor | None, length: int) -> SelfUpdate:
        """A self-update over a context of ``length`` tokens. ``tail`` [L, K, d], None if not initialised."""
        bos = None if tail is None else self._update_bos
        return SelfUpdate(self.config, tail, length, self.weights.embedding, bos)

    def first_block(self, block: Tensor) -> Tensor:
        """The block that fills a memory which was not initialised.

        The reference adds ``new_memory_positional_emb`` in place, so that this one block holds it once more
        in every layer but the last; so does ours, to agree with it.
        """
        filled = block.clone()
        filled[:-1] += self.weights.new_memory_position
        return filled

    # ------------------------------------------------------------ the pass itself

    @torch.inference_mode()
    def forward(self, batch: Batch, pools: Pools, cache: ContextCache) -> Tensor:
        """Logits [len(batch.logit_rows), vocab] in the weights' dtype.

        Writes the reads' K/V to ``cache``, and K/V and finished rows of self-updates to their SelfUpdate.
        """
        own = batch.tokens.shape[0]
        x = self.weights.embedding[batch.tokens]
        cos, sin = self.rope.at(batch.positions)
        marked = self._marked(batch) if batch.updates else None
        queried = self._queried(batch)
        update_rows = slice(batch.reads, None) if batch.updates else None
        alike, loose = alike_updates(batch.updates)
        wholes = [WholeUpdates(self.config, spans, self._update_bos) for spans in alike]
        tails = _tails(batch.updates)
        operations, delta = self.operations, None
        for index, layer in enumerate(self.weights.layers):
            if batch.updates:
                if tails:
                    x = torch.cat([x, *tails[index]])
                x[marked] += self.weights.new_memory_position
            # what a layer adds is added where it is normed next: one launch on a GPU
            x, normed = operations.add_norm(x, delta, layer.input_norm)
            qkv = layer.qkv(normed, update_rows)
            query, key, value = operations.place(
                qkv, cos, sin, batch.write_rows, cache.key[index], cache.value[index]
            )
            x = x if queried is None else x[queried]
            attended = query.new_empty(x.shape[0], self.config.num_heads * self.config.head_dim)
            if batch.attend is not None:
                batch.attend(index, query, pools, cache, attended)
            for whole in wholes:
                whole.attend(operations, index, query, key, value, attended)
            for update_span in loose:
                self._update(index, update_span, query, key, value, attended)
            x, normed = operations.add_norm(x, layer.output(attended, update_rows), layer.post_norm)
            gated = operations.gate(layer.gate_up(normed, update_rows))
            delta = layer.down(gated, update_rows)
            if batch.updates:
                # their rows are read, and others put beside them, before the next norm
                x, delta = x + delta, None
                for whole in wholes:
                    whole.collect(index, x)
                for update_span in loose:
                    _collect(index, update_span, x)
                x = x[:own]
        for whole in wholes:
            whole.finish()
        for update_span in batch.updates:
            update_span.update.done += update_span.count
        wanted = batch.logit_rows
        _, last = operations.add_norm(x[wanted], None if delta is None else delta[wanted], self.weights.norm)
        return linear(last, self.weights.head)

    def _marked(self, batch: Batch) -> Tensor:
        """Rows that ``new_memory_positional_emb`` is added to: of each update the last K of tail and context."""
        rows = [torch.empty(0, dtype=torch.int64)]
        for span in batch.updates:
            first = span.update.length - self.config.num_tokens - span.start
            rows.append(torch.arange(span.rows.start + min(max(first, 0), span.count), span.rows.stop))
            if span.tail_rows is not None:
                rows.append(torch.arange(span.tail_rows.stop - span.update.short, span.tail_rows.stop))
        return torch.cat(rows).to(self.device)

    def _queried(self, batch: Batch) -> Tensor | None:
        """Rows that are queries: all but the tails (None, the common case, if there are no tails)."""
        if not any(span.tail_rows is not None for span in batch.updates):
            return None
        rows = [torch.arange(batch.tokens.shape[0])]
        rows += [
            torch.arange(span.tail_rows.stop - span.update.short, span.tail_rows.stop)
            for span in batch.updates
            if span.tail_rows is not None
        ]
        return torch.cat(rows).to(self.device)

    def _update(
        self, index: int, span: UpdateSpan, query: Tensor, key: Tensor, value: Tensor, out: Tensor
    ) -> None:
        """A chunk of a self-update's context over bos, tail and context, causally. The pool is not read."""
        update = span.update
        base = update.prefix + span.start
        keys, values = (part[index] for part in update.kept)
        keys[:, base : base + span.count] = key[span.rows].transpose(0, 1)
        values[:, base : base + span.count] = value[span.rows].transpose(0, 1)
        if span.tail_rows is not None:
            tail = slice(update.prefix - self.config.num_tokens, update.prefix)
            keys[:, tail] = key[span.tail_rows].transpose(0, 1)
            values[:, tail] = value[span.tail_rows].transpose(0, 1)
        rows, first = [query[span.rows]], base
        if span.tail_outputs is not None and span.tail_rows is not None:
            rows.insert(0, query[span.tail_rows][-update.short :])
            first -= update.short
        queries = torch.cat(rows)
        end = base + span.count
        flat = self.operations.attend_causally(queries[None], keys[None, :, :end], values[None, :, :end])[0]
        out[span.rows] = flat[base - first :]
        if span.tail_outputs is not None:
            out[span.tail_outputs] = flat[: base - first]


def _tails(spans: list[UpdateSpan]) -> list[tuple[Tensor, ...]]:
    """Each layer's [K, d] of all tails in the batch."""
    tails = [s.update.tail for s in spans if s.tail_rows is not None and s.update.tail is not None]
    return list(zip(*(tail.unbind() for tail in tails), strict=True))


def _collect(index: int, span: UpdateSpan, x: Tensor) -> None:
    """Puts those of the layer's output rows that are new memory tokens into the block."""
    update = span.update
    if span.tail_outputs is not None:
        update.block[index, : update.short] = x[span.tail_outputs]
    num_tokens = update.block.shape[1]
    first_kept = max(span.start, update.length - num_tokens)
    kept = span.start + span.count - first_kept
    if kept > 0:
        start = first_kept - (update.length - num_tokens)
        update.block[index, start : start + kept] = x[span.rows.stop - kept : span.rows.stop]
