"""A pool is projected a layer at a time: as if all of it had been projected at once, in the room of one layer."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from app.memory.arena import Arena, Memory, View
from app.memory.lanes import lanes_of
from app.memory.loader import Loader
from app.memory.sample import AT_ONCE, sampled_blocks
from app.memory.source import Source
from app.model import pools as pooling
from app.model.backbone import Backbone
from app.model.torch_operations import TorchOperations
from kernels.quantise import dequantise_key, dequantise_value, key_scale, quantise_key, quantise_value
from kernels.rotate import rotate_pool
from tests.fakes import MemoryStore
from tests.harness import load_backbone

DTYPES = [torch.float32, torch.bfloat16]


def eight_bit(dtype: torch.dtype) -> Backbone:
    return load_backbone("plain", dtype, operations=partial(TorchOperations, eight_bit=True))[0]


def pool_of(backbone: Backbone, tokens: int) -> Tensor:
    config = backbone.config
    shape = (config.num_layers, tokens, config.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_are_those_of_a_pool_that_is_projected_at_once(dtype: torch.dtype) -> None:
    backbone = eight_bit(dtype)
    arena, config = Arena(backbone, 2, 2), backbone.config
    scale = key_scale(backbone.project(backbone.weights.memory)[0])
    for blocks in sampled_blocks(backbone, arena.pools):
        scale = torch.maximum(scale, key_scale(backbone.project(blocks)[0]))
    assert arena.pools.key_scale is not None
    assert torch.equal(arena.pools.key_scale, scale)
    for part in arena.pools.parts(1):
        part.fill_(7)
    hidden = pool_of(backbone, config.pool_size)
    rank = arena.project(1, hidden)
    assert torch.equal(rank, arena.first_rank())
    key, value = backbone.project(hidden)
    for found, put in zip(
        arena.pools._parts(1), (quantise_key(key, scale), *quantise_value(value)), strict=True
    ):
        assert torch.equal(found[:, :, : config.pool_size], put)
        assert not found[:, :, config.pool_size :].any(), "what is spare is not open"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_values_steps_are_those_of_the_plain_formula(dtype: torch.dtype) -> None:
    value = torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    value[0, 0, 0, 0], value[0, 0, 1], value[1, 2, 3, 4] = torch.nan, 0.0, torch.inf
    kept = value.clone()
    steps, scale = quantise_value(value)
    wide = value.float().nan_to_num(0.0, 0.0, 0.0)
    expected = (wide.abs().amax(dim=-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    assert torch.equal(scale, expected)
    assert torch.equal(steps, (wide / expected[..., None]).round().to(torch.int8))
    assert torch.equal(value.nan_to_num(), kept.nan_to_num()), "what was given is not written to"


def test_no_more_than_a_layer_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start, where the checkpoint's own pool is projected twice, and in a load."""
    backbone = eight_bit(torch.float32)
    config, quantised, project = backbone.config, [], backbone.project
    blocks: list[int] = []

    def noted(key: Tensor, scale: Tensor) -> Tensor:
        quantised.append(key.shape[0])
        return quantise_key(key, scale)

    def of_blocks(hidden: Tensor) -> tuple[Tensor, Tensor]:
        assert hidden.shape[1] <= AT_ONCE * config.num_tokens < config.pool_size, "a whole pool was projected"
        blocks.append(hidden.shape[1] // config.num_tokens)
        return project(hidden)

    monkeypatch.setattr(pooling, "quantise_key", noted)
    monkeypatch.setattr(backbone, "project", of_blocks)
    arena, lanes = Arena(backbone, 2, 2), lanes_of(backbone.device, backbone.dtype)
    Loader(arena, Source(backbone, MemoryStore(), "test"), lanes)
    assert quantised == [1] * config.num_layers
    # a sample, and one by itself, so that no two threads are the first to launch its kernel
    assert blocks == [AT_ONCE] * (len(blocks) - 1) + [1]
    brought: list[torch.Size] = []

    def bring(rows: Tensor) -> Tensor:
        brought.append(rows.shape)
        return rows

    arena.project(1, pool_of(backbone, config.pool_size), bring)
    assert quantised == [1] * 2 * config.num_layers
    assert brought == [(config.pool_size, config.hidden_size)] * config.num_layers


def test_a_first_block_fills_all_ranks() -> None:
    backbone = load_backbone("uninitialized")[0]
    arena, config = Arena(backbone, 2, 2), backbone.config
    born = torch.zeros(1, config.pool_size, dtype=torch.int32)
    memory = Memory("ada", 1, 1, 0, None, born, View(0, torch.full((config.num_layers, 1), -1)))
    block = pool_of(backbone, config.num_tokens)
    arena.publish(memory, block, None)
    for found, once in zip(arena.pools._parts(1), backbone.project(block), strict=True):
        assert torch.equal(found[:, :, : config.pool_size], once.repeat(1, 1, config.num_blocks, 1))
        assert not found[:, :, config.pool_size :].any()


def test_a_copy_of_eight_bits_is_unpacked_a_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = eight_bit(torch.bfloat16)
    arena, config, rope = Arena(backbone, 2, 2), backbone.config, backbone.rope
    pools = arena.pools
    rank = arena.project(1, pool_of(backbone, config.pool_size))
    assert pools.key_scale is not None
    assert pools.value_scale is not None
    key = dequantise_key(pools.key[:, 1], pools.key_scale, torch.bfloat16)
    value = dequantise_value(pools.value[:, 1], pools.value_scale[:, 1], torch.bfloat16)
    unpacked: list[int] = []

    def noted(steps: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        unpacked.append(steps.shape[0])
        return dequantise_key(steps, scale, dtype)

    monkeypatch.setattr(pooling, "dequantise_key", noted)
    arena.build_hot(1, rank, 1)
    assert unpacked == [1] * config.num_layers
    expected = torch.empty_like(key)
    rotate_pool(key, rank, rope.cos, rope.sin, config.first_rank_position, expected)
    assert pools.hot_key is not None
    assert pools.hot_value is not None
    assert torch.equal(pools.hot_key[:, 1], expected)
    assert torch.equal(pools.hot_value[:, 1], value)
