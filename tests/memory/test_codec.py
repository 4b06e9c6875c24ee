"""Blobs there and back."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load

from app.memory.codec import Block, Pool, decode_block, decode_snapshot, encode_block, encode_snapshot

LAYERS, SIZE, COUNT, WIDTH = 3, 20, 4, 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blobs_keep_every_bit(dtype: torch.dtype) -> None:
    block = Block(torch.randn(LAYERS, COUNT, WIDTH).to(dtype), torch.tensor([[1, 3, 5, 19]]))
    again = decode_block(encode_block(block))
    assert torch.equal(again.hidden, block.hidden)
    assert again.forgotten is not None
    assert block.forgotten is not None
    assert torch.equal(again.forgotten, block.forgotten)
    assert decode_block(encode_block(Block(block.hidden, None))).forgotten is None
    pool = Pool(torch.randn(LAYERS, SIZE, WIDTH).to(dtype), torch.zeros(1, SIZE, dtype=torch.int32))
    again_pool = decode_snapshot(encode_snapshot(pool))
    assert torch.equal(again_pool.hidden, pool.hidden)
    assert torch.equal(again_pool.born, pool.born)


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
