"""What stands between a layer's products, on random rows: each kernel against its twin in float64.

Outputs and caches are filled with NaN beforehand; what no row belongs to must still hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.add_norm import add_norm
from kernels.gate import swiglu
from kernels.norm import add_rms_norm
from kernels.rotate import rotate_rows
from kernels.rotate_rows import write_rotated_rows
from kernels.swiglu import write_swiglu

# a rounding of the result, of a sum before it, and what is between them in float32
ROUNDING = {torch.float32: 2**-20, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def normal(*size: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, generator=generator).to(device, dtype)


def close(found: Tensor, exact: Tensor) -> None:
    rounding = ROUNDING[found.dtype]
    torch.testing.assert_close(found.double(), exact, atol=rounding, rtol=rounding)


def check_add_norm(rows: int, width: int, *, adding: bool, dtype: torch.dtype, device: str = "cpu") -> None:
    x, other = (normal(rows + more, width, dtype=dtype, device=device)[:rows] * 3 for more in (0, 1))
    weight, delta = normal(width, dtype=dtype, device=device).abs() + 0.5, other if adding else None
    before = x.clone()
    total, normed = add_norm(x, delta, weight, 1e-5)
    assert torch.equal(x, before), "the rows were overwritten"
    # of the sum as it is kept: rounded
    exact, _ = add_rms_norm(x.double(), None if delta is None else delta.double(), weight.double(), 1e-5)
    close(total, exact)
    close(normed, add_rms_norm(total.double(), None, weight.double(), 1e-5)[1])


def check_swiglu(rows: int, width: int, dtype: torch.dtype, device: str = "cpu") -> None:
    both = normal(rows, 2 * width, dtype=dtype, device=device) * 4
    close(write_swiglu(both), swiglu(both.double()))


def check_rotate_rows(
    rows: int, reads: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    qkv = normal(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=device)
    angles = torch.arange(1, rows + 1)[:, None] * 0.7 ** torch.arange(head_dim // 2)
    cos = torch.cat([angles.cos()] * 2, -1).to(device, dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], -1).to(device, dtype)
    places = torch.randperm(2 * rows + 1, generator=torch.Generator().manual_seed(rows))[:reads].to(device)
    caches = [
        torch.full((2 * rows + 1, kv_heads, head_dim), torch.nan, dtype=dtype, device=device)
        for _ in range(2)
    ]
    twins = [cache.double() for cache in caches]
    exact = rotate_rows(qkv.double(), cos.double(), sin.double(), places, twins[0], twins[1])
    found = write_rotated_rows(qkv.clone(), cos, sin, places, caches[0], caches[1])
    for a, b in zip(found, exact, strict=True):
        close(a, b)
    assert found[0].is_contiguous()
    for cache, twin in zip(caches, twins, strict=True):
        close(cache[places], twin[places])
        others = torch.ones(len(cache), dtype=torch.bool, device=device)
        others[places] = False
        assert cache[others].isnan().all(), "another sequence's rows were written"
