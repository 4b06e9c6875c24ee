"""The forward pass: reads of many pools and self-updates of others, together in one batch (DESIGN, section 2).

Linear layers run once over all rows; attention goes to each row's own pool and context.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from app.model.batch import Batch, ContextCache, Pools, SelfUpdate, Span, UpdateSpan
from app.model.config import ModelConfig
from app.model.rope import RopeTable
from app.model.weights import Layer, Weights
from kernels.attention import merge, pack_heads, partial_attention, unpack_heads
from kernels.linear import linear
from kernels.rotate import rotate, rotate_pool
from kernels.update_write import project_memory


class Backbone:
    """Holds weights and rotary table; ``max_sequence`` bounds prompt and completion, in tokens."""

    def __init__(self, config: ModelConfig, weights: Weights, max_sequence: int) -> None:
        self.config = config
        self.weights = weights
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        context = 1 + config.num_tokens + max(config.max_context, max_sequence)
        length = config.prompt_position + max(max_sequence, context)
        self.rope = RopeTable(config, length, self.dtype, self.device)
        self._read_bos = self._bos(update=False)
        self._update_bos = self._bos(update=True)

    # ------------------------------------------------------------ projections outside the batch

    def _bos(self, *, update: bool) -> tuple[Tensor, Tensor] | None:
        """K, V of the bos embeddings, each [L, H_kv, d_head]; position 0, so K needs no rotation."""
        if self.weights.bos is None:
            return None
        keys, values = [], []
        for row, layer in zip(self.weights.bos, self.weights.layers, strict=True):
            x = F.rms_norm(row[None], row.shape, layer.input_norm, self.config.rms_norm_eps)
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

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden memory [L, T, d] -> K (un-rotated), V, each [L, H_kv, T, d_head], for reading.

        Always in pieces of K rows, so that a pool read back from the store gives the very bits it gave when
        its blocks were written one by one.
        """
        c = self.config
        shape = (c.num_layers, c.num_kv_heads, hidden.shape[1], c.head_dim)
        keys, values = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        first_key_row = c.num_heads * c.head_dim
        for index, layer in enumerate(self.weights.layers):
            weight = layer.qkv.weight[first_key_row:]
            bias = None if layer.qkv.bias is None else layer.qkv.bias[first_key_row:]
            for start in range(0, hidden.shape[1], c.num_tokens):
                rows = slice(start, start + c.num_tokens)
                piece = hidden[index, rows].to(self.device, self.dtype)
                keys[index, :, rows], values[index, :, rows] = project_memory(
                    piece, layer.input_norm, c.rms_norm_eps, weight, bias, c.num_kv_heads
                )
        return keys, values

    def rotate_pool(self, key: Tensor, rank: Tensor, out: Tensor) -> None:
        """The rotated copy of one pool: ``key`` and ``out`` [L, H_kv, N + K, d_head], ``rank`` [L, N + K]."""
        rotate_pool(key, rank, self.rope.cos, self.rope.sin, self.config.first_rank_position, out)

    def begin_update(self, tail: Tensor | None, length: int) -> SelfUpdate:
        """A self-update over a context of ``length`` tokens. ``tail`` [L, K, d], None if not initialised."""
        update = SelfUpdate(self.config, tail, length, self.weights.embedding)
        if tail is not None and self._update_bos is not None:
            update.key[:, :, 0], update.value[:, :, 0] = self._update_bos
        return update

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
        cos, sin = (t[:, None] for t in self.rope.at(batch.positions))
        marked, queried = self._marked(batch), self._queried(batch)
        update_rows = slice(batch.reads, None) if batch.updates else None
        for index, layer in enumerate(self.weights.layers):
            if batch.updates:
                tails = [
                    s.update.tail[index] for s in batch.updates if s.tail_rows and s.update.tail is not None
                ]
                x = torch.cat([x, *tails])
                x[marked] += self.weights.new_memory_position
            normed = F.rms_norm(x, x.shape[-1:], layer.input_norm, self.config.rms_norm_eps)
            query, key, value = self._split(layer.qkv(normed, update_rows))
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            cache.key[index].index_copy_(0, batch.write_rows, key[: batch.reads])
            cache.value[index].index_copy_(0, batch.write_rows, value[: batch.reads])
            x = x if queried is None else x[queried]
            attended = query.new_empty(x.shape[0], self.config.num_heads * self.config.head_dim)
            if batch.decode:
                self._decode(index, batch, query, pools, cache, attended)
            for span in batch.spans:
                self._prefill(index, span, query, pools, cache, attended)
            for update_span in batch.updates:
                self._update(index, update_span, query, key, value, attended)
            x = self._rest(layer, x, attended, update_rows)
            for update_span in batch.updates:
                _collect(index, update_span, x)
            x = x[:own]
        for update_span in batch.updates:
            update_span.update.done += update_span.count
        last = F.rms_norm(x[batch.logit_rows], x.shape[-1:], self.weights.norm, self.config.rms_norm_eps)
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

    def _rest(self, layer: Layer, x: Tensor, attended: Tensor, update_rows: slice | None) -> Tensor:
        """Output projection and MLP, each with its residual."""
        x = x + layer.output(attended, update_rows)
        normed = F.rms_norm(x, x.shape[-1:], layer.post_norm, self.config.rms_norm_eps)
        gate, up = layer.gate_up(normed, update_rows).chunk(2, dim=-1)
        return x + layer.down(F.silu(gate) * up, update_rows)

    def _decode(
        self, index: int, batch: Batch, query: Tensor, pools: Pools, cache: ContextCache, out: Tensor
    ) -> None:
        """One query row a sequence: its pool, in runs of neighbours, and its context, in buckets of length."""
        c = self.config
        rows = batch.decode
        context = out.new_empty(rows, c.num_heads, c.head_dim)
        normaliser = torch.empty(rows, c.num_heads, dtype=torch.float32, device=out.device)
        for bucket in batch.buckets:
            count, length = bucket.table.shape
            shape = (count, length, c.num_kv_heads, c.head_dim)
            flat = bucket.table.view(-1)
            output, norm = partial_attention(
                query[bucket.rows].view(count, c.num_kv_heads, c.group_size, c.head_dim),
                cache.key[index].index_select(0, flat).view(shape).transpose(1, 2),
                cache.value[index].index_select(0, flat).view(shape).transpose(1, 2),
                bucket.bias,
            )
            context[bucket.rows] = output.reshape(count, c.num_heads, c.head_dim)
            normaliser[bucket.rows] = norm.reshape(count, c.num_heads)
        for run in batch.runs:
            packed = query[run.rows].view(run.pools, -1, c.num_heads, c.head_dim)
            tokens = packed.shape[1]
            output, norm = partial_attention(
                pack_heads(packed, c.num_kv_heads),
                pools.hot_key[index, run.hot],
                pools.value[index, run.slots],
                pools.bias[index, run.hot, None, None],
            )
            output = unpack_heads(output, tokens).view(-1, c.num_heads, c.head_dim)
            norm = unpack_heads(norm[..., None], tokens).view(-1, c.num_heads)
            context[run.rows], _ = merge(output, norm, context[run.rows], normaliser[run.rows])
        out[:rows] = context.view(rows, -1)

    def _prefill(
        self, index: int, span: Span, query: Tensor, pools: Pools, cache: ContextCache, out: Tensor
    ) -> None:
        """A chunk of a prompt: the pool without a mask, bos and prompt causally."""
        kv_heads = self.config.num_kv_heads
        packed = pack_heads(query[span.rows][None], kv_heads)
        output, norm = partial_attention(
            packed,
            cache.key[index].index_select(0, span.table).transpose(0, 1)[None],
            cache.value[index].index_select(0, span.table).transpose(0, 1)[None],
            span.bias,
        )
        if span.hot is not None and span.slot is not None:
            pool, pool_norm = partial_attention(
                packed,
                pools.hot_key[index, span.hot][None],
                pools.value[index, span.slot][None],
                pools.bias[index, span.hot][None, None, None],
            )
            output, _ = merge(pool, pool_norm, output, norm)
        out[span.rows] = unpack_heads(output, span.rows.stop - span.rows.start)[0]

    def _update(
        self, index: int, span: UpdateSpan, query: Tensor, key: Tensor, value: Tensor, out: Tensor
    ) -> None:
        """A chunk of a self-update's context over bos, tail and context, causally. The pool is not read."""
        update = span.update
        base = update.prefix + span.start
        keys, values = update.key[index], update.value[index]
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
        bias = causal_bias(queries.shape[0], end, self.config.group_size, self.dtype, self.device)
        output, _ = partial_attention(
            pack_heads(queries[None], self.config.num_kv_heads),
            keys[None, :, :end],
            values[None, :, :end],
            bias,
        )
        flat = unpack_heads(output, queries.shape[0])[0]
        out[span.rows] = flat[base - first :]
        if span.tail_outputs is not None:
            out[span.tail_outputs] = flat[: base - first]


def causal_bias(
    queries: int, keys: int, group_size: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """[1, 1, G * queries, keys]: the last ``queries`` of ``keys`` positions look at none after themselves."""
    if queries == 1:
        return None
    own = torch.full((queries, queries), -torch.inf, dtype=dtype, device=device).triu(1)
    return F.pad(own, (keys - queries, 0)).repeat(group_size, 1)[None, None]


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
