"""Blobs there and back, and replaying them against forgetting step by step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from app.errors import FingerprintMismatch
from app.memory import codec
from app.memory.codec import (
    Block,
    Pool,
    decode_block,
    decode_snapshot,
    encode_block,
    encode_snapshot,
    replay,
)
from app.model.forgetting import draw, forget

LAYERS, SIZE, COUNT, WIDTH = 3, 20, 4, 6


def base(rows: int, dtype: torch.dtype = torch.float32) -> Pool:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(LAYERS, SIZE, WIDTH, generator=generator).to(dtype)
    return Pool(hidden, torch.zeros(rows, SIZE, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blobs_keep_every_bit(dtype: torch.dtype) -> None:
    block = Block(torch.randn(LAYERS, COUNT, WIDTH).to(dtype), torch.tensor([[1, 3, 5, 19]]))
    again = decode_block(encode_block(block))
    assert torch.equal(again.hidden, block.hidden)
    assert again.forgotten is not None
    assert block.forgotten is not None
    assert torch.equal(again.forgotten, block.forgotten)
    assert decode_block(encode_block(Block(block.hidden, None))).forgotten is None
    pool = base(1, dtype)
    again_pool = decode_snapshot(encode_snapshot(pool))
    assert torch.equal(again_pool.hidden, pool.hidden)
    assert torch.equal(again_pool.born, pool.born)


@settings(deadline=None)
@given(st.integers(0, 12), st.booleans(), st.booleans(), st.integers(0, 2**30))
def test_replay_is_forgetting_step_by_step(updates: int, per_layer: bool, fills: bool, seed: int) -> None:
    rows = LAYERS if per_layer else 1
    pool = base(rows)
    hidden, born = pool.hidden, pool.born
    blocks = []
    for version in range(1, updates + 1):
        generator = torch.Generator().manual_seed(seed + version)
        new = torch.randn(LAYERS, COUNT, WIDTH, generator=generator)
        if fills and version == 1:
            blocks.append((version, Block(new, None)))
            hidden = new.repeat(1, SIZE // COUNT, 1)
            born = torch.full_like(born, 1)
            continue
        drawn = draw(seed, version, pool_size=SIZE, num_tokens=COUNT, num_layers=LAYERS, per_layer=per_layer)
        blocks.append((version, Block(new, drawn)))
        hidden = forget(hidden, drawn, new)
        fresh = torch.full((rows, COUNT, 1), version, dtype=torch.int32)
        born = forget(born[..., None], drawn, fresh)[..., 0]
    replayed = replay(pool, blocks)
    assert torch.equal(replayed.hidden, hidden)
    assert torch.equal(replayed.born, born)
    middle = updates // 2
    halfway = decode_snapshot(encode_snapshot(replay(pool, blocks[:middle])))
    assert torch.equal(replay(halfway, blocks[middle:]).hidden, hidden)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("together", [1, 3, SIZE])
def test_a_pool_is_replayed_in_its_own_memory(
    monkeypatch: pytest.MonkeyPatch, together: int, per_layer: bool
) -> None:
    monkeypatch.setattr(codec, "_MOVED", together * WIDTH * 4)
    blocks = []
    for version in range(1, 4):
        drawn = draw(7, version, pool_size=SIZE, num_tokens=COUNT, num_layers=LAYERS, per_layer=per_layer)
        blocks.append((version, Block(torch.randn(LAYERS, COUNT, WIDTH), drawn)))
    pool = base(LAYERS if per_layer else 1)
    expected = replay(pool, blocks)
    replayed = replay(pool, blocks, reuse=True)
    assert replayed.hidden.data_ptr() == pool.hidden.data_ptr()
    assert torch.equal(replayed.hidden, expected.hidden)
    assert torch.equal(replayed.born, expected.born)


def test_a_block_of_another_shape_is_refused() -> None:
    with pytest.raises(FingerprintMismatch):
        replay(base(1), [(1, Block(torch.zeros(LAYERS, COUNT, WIDTH + 1), torch.tensor([[0, 1, 2, 3]])))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_snapshot_is_a_safetensors_file(dtype: torch.dtype) -> None:
    """Also of a pool that does not lie in memory as it is told of."""
    hidden = torch.randn(2, 8, 6).transpose(1, 2).to(dtype)
    pool = Pool(hidden, torch.arange(6, dtype=torch.int32).expand(2, 6))
    blob = encode_snapshot(pool)
    found = load(blob)
    assert set(found) == {"memory", "born"}
    assert torch.equal(found["memory"], hidden)
    assert torch.equal(found["born"], pool.born)
    assert decode_snapshot(blob).hidden.dtype == dtype
    # what maps the file finds its tensors aligned
    assert int.from_bytes(blob[:8], "little") % 8 == 0
