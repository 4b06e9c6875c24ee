"""Device memory for memory pools, and for the copies that generations read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from app.model.config import ModelConfig
from kernels.quantise import (
    dequantise_key,
    dequantise_value,
    quantise_key,
    quantise_value,
)

_ALL = slice(None)


@dataclass(frozen=True)
class PoolForm:
    """How pools lie in device memory.

    ``copies``: readers use rotated copies of K; otherwise K is rotated as it is read, and a copy is no more than
    a rank vector. ``eight_bit``: K and V are int8 with scales (``kernels.quantise``). ``value_copies``: copies hold
    V too, for readers that cannot read 8 bits. ``by_channel``: K lies with the slots last, in pools and copies.
    """

    copies: bool = True
    eight_bit: bool = False
    value_copies: bool = False
    by_channel: bool = False

    def pool_bytes(self, config: ModelConfig, dtype: torch.dtype) -> int:
        """Device bytes of one pool, its copies apart."""
        vectors = config.num_layers * config.num_kv_heads * config.pool_slots
        if self.eight_bit:
            return vectors * (2 * config.head_dim + torch.float32.itemsize)
        return 2 * vectors * config.head_dim * dtype.itemsize

    def copy_bytes(self, config: ModelConfig, dtype: torch.dtype) -> int:
        """Device bytes of what one version of a pool takes to be read."""
        slots = config.num_layers * config.pool_slots
        if not self.copies:
            return slots * torch.int32.itemsize
        vectors = slots * config.num_kv_heads * (2 if self.value_copies else 1)
        return vectors * config.head_dim * dtype.itemsize + slots * dtype.itemsize


@dataclass(frozen=True)
class Pools:
    """``slots`` pools, and ``hot`` versions of them that can be read.

    ``key`` (un-rotated) and ``value`` [L, slots, H_kv, N + K, d_head], whichever way they lie in memory.
    By ``form`` there are: ``hot_key`` (rotated) and
    ``hot_value`` [L, hot, H_kv, N + K, d_head] with ``bias`` [L, hot, N + K], 0 for a rank and -inf for a spare slot
    of that version (``form.by_channel``: ``hot_key`` is [L, hot, H_kv, d_head, N + K]); or ``rank`` int32
    [L, hot, N + K], -1 for a spare slot; and of 8-bit pools ``key_scale`` float32 [L, H_kv, d_head], the same for all
    pools, and ``value_scale`` float32 [L, slots, H_kv, N + K].
    """

    form: PoolForm
    key: Tensor
    value: Tensor
    hot_key: Tensor | None = None
    hot_value: Tensor | None = None
    bias: Tensor | None = None
    rank: Tensor | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        slots: int,
        hot: int,
        dtype: torch.dtype,
        device: torch.device,
        form: PoolForm | None = None,
        key_scale: Tensor | None = None,
    ) -> Pools:
        """``key_scale`` is needed for 8-bit pools and for no others."""
        form = form or PoolForm()
        assert form.eight_bit == (key_scale is not None)

        def empty(count: int, kind: torch.dtype, by_channel: bool = False) -> Tensor:
            each = (config.pool_slots, config.head_dim)
            shape = (config.num_layers, count, config.num_kv_heads, *(each[::-1] if by_channel else each))
            return torch.empty(shape, dtype=kind, device=device)

        kind = torch.int8 if form.eight_bit else dtype
        views = (config.num_layers, hot, config.pool_slots)
        key = empty(slots, kind, form.by_channel)
        if form.by_channel:
            key = key.transpose(-1, -2)
        return cls(
            form,
            key,
            empty(slots, kind),
            hot_key=empty(hot, dtype, form.by_channel) if form.copies else None,
            hot_value=empty(hot, dtype) if form.value_copies else None,
            bias=torch.empty(views, dtype=dtype, device=device) if form.copies else None,
            rank=None if form.copies else torch.full(views, -1, dtype=torch.int32, device=device),
            key_scale=key_scale,
            value_scale=torch.empty(key.shape[:-1], device=device) if form.eight_bit else None,
        )

    def parts(self, slot: int) -> list[Tensor]:
        """All that one pool is made of, as views with the layers first, as it lies: what a warm copy keeps."""
        key, *rest = self._parts(slot)
        return [key.transpose(2, 3) if self.form.by_channel else key, *rest]

    def _parts(self, slot: int) -> list[Tensor]:
        """As ``parts``, each with the slots in its third dimension."""
        whole = [self.key, self.value] + ([] if self.value_scale is None else [self.value_scale])
        return [tensor[:, slot] for tensor in whole]

    def open(self, slot: int, first: int) -> None:
        """Empties the slots of a pool from ``first`` on. Spare slots are read with weight zero: they must be finite."""
        for part in self._parts(slot):
            part[:, :, first:] = 0

    def copy_parts(self, hot: int) -> list[Tensor]:
        """The vectors of one version that can be read; none where readers go to the pool itself."""
        return [tensor[:, hot] for tensor in (self.hot_key, self.hot_value) if tensor is not None]

    @cached_property
    def hot_keys(self) -> list[tuple[Tensor, ...]]:
        """Of each layer ``hot_key`` by copy."""
        assert self.hot_key is not None
        return [layer.unbind() for layer in self.hot_key]

    @cached_property
    def read_values(self) -> list[tuple[Tensor, ...]]:
        """Of each layer the values that readers of copies read: by copy if copies have their own, else by slot."""
        return [layer.unbind() for layer in (self.value if self.hot_value is None else self.hot_value)]

    def put(self, slot: int, slots: Tensor | slice, key: Tensor, value: Tensor, layers: slice = _ALL) -> None:
        """Writes K, V [L, H_kv, T, d_head] to ``slots`` (int64 [L, T], or neighbours) of a pool, as it is kept.

        ``layers``: of these layers alone, which is then L; a whole 8-bit pool is put layer by layer, since what
        becomes of it on the way takes several times its room.
        """
        tensors = [key, value]
        if self.key_scale is not None:
            tensors = [quantise_key(key, self.key_scale[layers]), *quantise_value(value)]
        for whole, tensor in zip(self._parts(slot), tensors, strict=True):
            part = whole[layers]
            if isinstance(slots, slice):
                part[:, :, slots] = tensor
                continue
            for layer, at in enumerate(slots.to(part.device)):
                part[layer][:, at] = tensor[layer]

    def whole(self, slot: int, dtype: torch.dtype, layers: slice = _ALL) -> tuple[Tensor, Tensor]:
        """K (un-rotated) and V of one pool, [L, H_kv, N + K, d_head] in ``dtype``, whatever they are kept as.

        ``layers`` as in ``put``.
        """
        key, value = self.key[layers, slot], self.value[layers, slot]
        if self.key_scale is None or self.value_scale is None:
            return key, value
        scale = self.value_scale[layers, slot]
        return dequantise_key(key, self.key_scale[layers], dtype), dequantise_value(value, scale, dtype)
