"""The trial that kernels pass before they serve finds wrong ones."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from app.model import trial as trial_module
from app.model.batch import Reading
from app.model.kernel_operations import KernelOperations
from app.model.operations import Operations, Sizes
from app.model.pools import Pools
from app.model.rope import RopeTable
from app.model.torch_operations import TorchOperations
from app.model.torch_reads import Reads
from app.model.trial import Wrong, try_out
from tests.harness import load_backbone
from tests.kernels.test_operations import CPU, SIZES, pytestmark  # noqa: F401

ONE = replace(SIZES, sequences=1)


class UpsideDown(TorchOperations):
    """Rotates by the wrong ranks."""

    def make_readable(self, pools: Pools, slot: int, rank: Tensor, hot: int) -> None:
        super().make_readable(pools, slot, torch.where(rank < 0, rank, rank.max() - rank), hot)


class Nowhere(TorchOperations):
    """Writes a block beside its slots."""

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
        super().write(hidden, norm, weight, bias, slots.flip(0), key, value)


class Careless(TorchOperations):
    """A self-update's rows see what comes after them."""

    def attend_causally(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().attend_causally(query[:, -1:], key, value).expand(-1, query.shape[1], -1)


class Unsummed(TorchOperations):
    """Norms what a layer was given, without what the one before adds."""

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        total, _ = super().add_norm(x, delta, weight)
        return total, super().add_norm(x, None, weight)[1]


class Ajar(TorchOperations):
    """Takes the gate for what it lets through."""

    def gate(self, gate_up: Tensor) -> Tensor:
        return super().gate(gate_up.roll(gate_up.shape[1] // 2, dims=1))


class Elsewhere(TorchOperations):
    """Puts a token's K and V where another's belong; others place wrongly in ways of their own."""

    def place(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        write_rows: Tensor,
        cache_key: Tensor,
        cache_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return super().place(qkv, cos, self.turn(sin), self.rows(write_rows), cache_key, cache_value)

    def rows(self, rows: Tensor) -> Tensor:
        return rows.flip(0)

    def turn(self, sin: Tensor) -> Tensor:
        return sin


class Further(Elsewhere):
    """A row further."""

    def rows(self, rows: Tensor) -> Tensor:
        return rows + 1


class Backwards(Elsewhere):
    """Rotates the wrong way."""

    def rows(self, rows: Tensor) -> Tensor:
        return rows

    def turn(self, sin: Tensor) -> Tensor:
        return -sin


def trial(make: object, sizes: Sizes = SIZES, dtype: torch.dtype = torch.float32) -> None:
    backbone, _ = load_backbone("plain")
    given = backbone.config, RopeTable(backbone.config, len(backbone.rope.cos), dtype, CPU), dtype, CPU
    operations: Operations = make(*given)  # type: ignore[operator]
    try_out(operations, *given, sizes)


@pytest.mark.parametrize("form", [{}, {"rotating": True}, {"eight_bit": True}], ids=str)
def test_the_kernels_pass(form: dict[str, bool]) -> None:
    trial(partial(KernelOperations, sizes=SIZES, **form))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (UpsideDown, "reading"),
        (Nowhere, "writing"),
        (Careless, "self-update"),
        (Unsummed, "norm"),
        (Ajar, "gate"),
        (Elsewhere, "rotating rows"),
        (Further, "rotating rows"),
        (Backwards, "rotating rows"),
    ],
)
def test_wrong_operations_do_not(wrong: type[TorchOperations], reason: str) -> None:
    with pytest.raises(Wrong, match=reason):
        trial(wrong)


def test_the_kernels_pass_in_half_precision() -> None:
    trial(partial(KernelOperations, sizes=SIZES), dtype=torch.float16)


def test_the_kernels_pass_with_room_for_one_sequence() -> None:
    trial(partial(KernelOperations, sizes=ONE), ONE)


class LongPool(TorchOperations):
    """Reads like torch; subclasses spoil it."""

    def prepare(self, readings: list[Reading], decode: int) -> Reads:
        return super().prepare([self.spoiled(reading) for reading in readings], decode)

    def spoiled(self, reading: Reading) -> Reading:
        return reading

    def make_readable(self, pools: Pools, slot: int, rank: Tensor, hot: int) -> None:
        super().make_readable(pools, slot, self.ranks(rank), hot)
        assert pools.bias is not None
        self.hide(pools.bias[:, hot])

    def ranks(self, rank: Tensor) -> Tensor:
        return rank

    def hide(self, bias: Tensor) -> None:
        pass


class NoContext(LongPool):
    def spoiled(self, reading: Reading) -> Reading:
        return replace(reading, seen=reading.rows.stop - reading.rows.start)


class SpareSlots(LongPool):
    def ranks(self, rank: Tensor) -> Tensor:
        return rank.clamp(min=0)


class LostShare(LongPool):
    """What one of 33 workers should have read is missing."""

    def hide(self, bias: Tensor) -> None:
        bias[:, : bias.shape[1] // 33] = -torch.inf


class NoPool(LongPool):
    def spoiled(self, reading: Reading) -> Reading:
        return replace(reading, hot=None, slot=None)


class ManyReaders(LongPool):
    """Wrong only where many sequences share a tile."""

    def prepare(self, readings: list[Reading], decode: int) -> Reads:
        if decode < 5:
            return super().prepare(readings, decode)
        return super().prepare([replace(reading, hot=None, slot=None) for reading in readings], decode)


@pytest.mark.parametrize("make", [LongPool, NoContext, SpareSlots, LostShare, NoPool, ManyReaders])
def test_what_is_let_pass_in_bfloat16_is_less_than_what_is_wrong(
    make: type[TorchOperations], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over thousands of keys outputs are so small that a wrong one differs by less than a block's rounding."""
    monkeypatch.setitem(trial_module._TOLERANCE, torch.float32, trial_module._TOLERANCE[torch.bfloat16])
    config = replace(load_backbone("plain")[0].config, num_blocks=50, num_tokens=160, head_dim=32)
    given = config, RopeTable(config, config.pool_slots + 64, torch.float32, CPU), torch.float32, CPU
    sizes = Sizes(rows=40, sequences=8, context=80)
    if make is LongPool:
        try_out(make(*given), *given, sizes)
        return
    with pytest.raises(Wrong, match="reading"):
        try_out(make(*given), *given, sizes)
