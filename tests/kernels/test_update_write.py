"""The read-side projection of memory vectors, against float64."""

from __future__ import annotations

import pytest
import torch

from kernels.update_write import project_memory


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "kv_heads", "head_dim"), [(1, 1, 16), (5, 3, 64), (8, 2, 128)])
def test_norm_then_projection(tokens: int, kv_heads: int, head_dim: int, biased: bool) -> None:
    width, eps = 40, 1e-5
    hidden, norm = torch.randn(tokens, width), torch.rand(width) + 0.5
    weight = torch.randn(2 * kv_heads * head_dim, width)
    bias = torch.randn(2 * kv_heads * head_dim) if biased else None
    key, value = project_memory(hidden, norm, eps, weight, bias, kv_heads)
    assert key.shape == value.shape == (kv_heads, tokens, head_dim)
    x = hidden.double()
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.double()
    for part, rows in ((key, weight[: kv_heads * head_dim]), (value, weight[kv_heads * head_dim :])):
        for head in range(kv_heads):
            own = slice(head * head_dim, (head + 1) * head_dim)
            expected = normed @ rows[own].double().T
            if bias is not None:
                offset = bias[: kv_heads * head_dim] if part is key else bias[kv_heads * head_dim :]
                expected = expected + offset[own].double()
            torch.testing.assert_close(part[head].double(), expected, atol=1e-4, rtol=1e-4)
