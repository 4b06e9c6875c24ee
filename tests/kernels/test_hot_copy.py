"""The rotation kernel under Triton's interpreter, against its torch twin in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.checks import BadKernelInput
from kernels.hot_copy import write_hot_copy
from kernels.rotate import rotate_pool


def inputs(layers: int, kv_heads: int, slots: int, head_dim: int, spare: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(head_dim)
    # one slot of a slab: its layers are apart
    slab = torch.randn(layers, 2, kv_heads, slots, head_dim, generator=generator)
    rank = torch.stack([torch.randperm(slots, generator=generator, dtype=torch.int32) for _ in range(layers)])
    rank[rank >= slots - spare] = -1
    angles = torch.arange(slots + 1)[:, None] * 0.3 ** torch.arange(head_dim // 2)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    return slab[:, 1], rank, cos, sin


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("first_position", [0, 1])
def test_against_the_twin(head_dim: int, first_position: int) -> None:
    key, rank, cos, sin = inputs(3, 2, 37, head_dim, 6)
    spare = rank < 0
    for layer in range(3):
        key[layer][:, spare[layer]] = torch.nan
    slab = torch.full((3, 3, 2, 37, head_dim), torch.nan)
    write_hot_copy(key, rank, cos, sin, first_position, slab[:, 2])
    expected = torch.empty(3, 2, 37, head_dim, dtype=torch.float64)
    rotate_pool(key.double(), rank, cos.double(), sin.double(), first_position, expected)
    hidden = spare[:, None, :, None].expand_as(expected)
    torch.testing.assert_close(slab[:, 2].double(), expected.masked_fill(hidden, 0), atol=1e-6, rtol=1e-6)
    assert slab[:, :2].isnan().all(), "another tenant's copy was written"


def test_half_precision_is_rounded_once() -> None:
    key, rank, cos, sin = inputs(2, 1, 19, 32, 0)
    out = torch.full(key.shape, torch.nan, dtype=torch.float16)
    write_hot_copy(key.half().contiguous(), rank, cos, sin, 0, out)
    exact = torch.empty(key.shape)
    rotate_pool(key.half().float(), rank, cos, sin, 0, exact)
    torch.testing.assert_close(out.float(), exact, atol=1e-6, rtol=2**-10)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("key", lambda t: t[0], "head size"),
        ("key", lambda t: t.transpose(1, 2), "not contiguous"),
        ("rank", lambda t: t.long(), "rank is torch.int64"),
        ("rank", lambda t: t[:, 1:], "rank has shape"),
        ("cos", lambda t: t[1:], "sin has shape"),
        ("out", lambda t: t[1:], "out has shape"),
        ("out", lambda t: t.half(), "out is torch.float16"),
        ("first_position", lambda p: p + 1, "end before"),
        ("first_position", lambda _: -1, "end before"),
    ],
)
def test_wrong_tensors_are_refused(name: str, change: object, message: str) -> None:
    key, rank, cos, sin = inputs(2, 2, 19, 16, 3)
    given = {
        "key": key,
        "rank": rank,
        "cos": cos,
        "sin": sin,
        "first_position": 1,
        "out": torch.empty(key.shape),
    }
    assert callable(change)
    given[name] = change(given[name])
    with pytest.raises(BadKernelInput, match=message):
        write_hot_copy(**given)  # type: ignore[arg-type]
