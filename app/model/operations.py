"""What the backbone asks of the device it runs on: reading pools and contexts, rotating pools, writing blocks, and
what stands between the products of a layer.

There are two forms: ``torch_operations`` for CPUs, which also defines the truth, and ``kernel_operations``, the
Triton kernels for GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from app.model.batch import ContextCache, Reading
from app.model.config import ModelConfig
from app.model.pools import PoolForm, Pools
from app.model.rope import RopeTable


@dataclass(frozen=True)
class Sizes:
    """Bounds that buffers are made for: ``rows`` query rows a step, ``sequences`` that run at once,
    ``context`` cache rows that one sequence may have (bos, prompt and completion, in whole pages)."""

    rows: int
    sequences: int
    context: int


class Attend(Protocol):
    """One step's reads, prepared: called once a layer."""

    def __call__(self, layer: int, query: Tensor, pools: Pools, cache: ContextCache, out: Tensor) -> None:
        """Writes the attention of ``query`` [rows, H, d_head] (rotated) to ``out`` [rows, H * d_head]."""
        ...


class Operations(Protocol):
    """Instances belong to one backbone; ``form`` is how they want pools to lie."""

    form: PoolForm

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` + ``delta`` (``x`` itself if that is None), and its RMSNorm by ``weight`` [d]; each [rows, d]."""
        ...

    def place(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        write_rows: Tensor,
        cache_key: Tensor,
        cache_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Q [rows, H, d_head], K and V [rows, H_kv, d_head] of ``qkv`` [rows, (H + 2 H_kv) d_head], which may be
        overwritten: Q and K rotated by ``cos``, ``sin`` [rows, d_head]. K and V of the first rows go to the rows
        ``write_rows`` int64 [reads] of one layer's contexts [cache rows, H_kv, d_head]."""
        ...

    def gate(self, gate_up: Tensor) -> Tensor:
        """SwiGLU: silu(gate) * up [rows, n] of both side by side [rows, 2 n]."""
        ...

    def prepare(self, readings: list[Reading], decode: int) -> Attend:
        """``readings`` cover the step's first rows in order; the first ``decode`` are single rows of decoding
        sequences, the others chunks of prompts."""
        ...

    def attend_causally(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Self-updates' rows: of each, ``query`` [B, T, H, d_head] are the last T of the S rows of ``key`` and
        ``value`` [B, H_kv, S, d_head]; each sees those up to itself. Returns [B, T, H * d_head]."""
        ...

    def make_readable(self, pools: Pools, slot: int, rank: Tensor, hot: int) -> None:
        """Puts into copy ``hot`` what reading the pool in ``slot`` by ``rank`` int32 [L, N + K] (on the host) takes.

        Spare slots of that version (-1) hold anything.
        """
        ...

    def prepare_slots(self, slots: Tensor, pool_slots: int) -> Tensor:
        """``slots`` int64 [..., T] (on the host), different ones of a pool's in each row, as ``write`` takes them: on
        the device, all in one copy. A form that could do harm by wrong ones checks them here."""
        ...

    def write(
        self,
        hidden: Tensor,
        norm: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        slots: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> None:
        """Projects one layer's memory vectors ``hidden`` [T, d] to K (un-rotated) and V, and writes them to the
        prepared ``slots`` [T] of ``key`` and ``value`` [H_kv, S, d_head].

        ``norm`` [d]; ``weight`` [2 * H_kv * d_head, d], its K rows first; ``bias`` of as many or None.
        """
        ...

    def write_blocks(
        self,
        hidden: Tensor,
        norm: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pools: list[int],
        slots: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> None:
        """As ``write``, of blocks ``hidden`` [B, K, d] for as many ``pools``, each once: ``slots`` [B, K], ``key`` and
        ``value`` [P, H_kv, S, d_head]. A block's bits do not depend on those beside it."""
        ...


MakeOperations = Callable[[ModelConfig, RopeTable, torch.dtype, torch.device], Operations]
