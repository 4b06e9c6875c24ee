"""Which models the kernels take: those for which none of them spills."""

from __future__ import annotations

import pytest
import torch

from kernels.support import unsupported


@pytest.mark.parametrize(
    ("dtype", "head_dim", "rotating", "reason"),
    [
        (torch.bfloat16, 128, True, None),
        (torch.float16, 256, False, None),
        (torch.bfloat16, 130, True, "above 128"),
        (torch.bfloat16, 258, False, "from 16 to 256"),
        (torch.bfloat16, 14, False, "from 16 to 256"),
        (torch.bfloat16, 65, False, "even"),
        (torch.float32, 64, True, None),
        (torch.float32, 66, False, "at most 64 in float32"),
        (torch.float64, 64, False, "float64"),
    ],
)
def test_head_sizes_and_dtypes(dtype: torch.dtype, head_dim: int, rotating: bool, reason: str | None) -> None:
    found = unsupported(torch.device("cpu"), dtype, head_dim, rotating=rotating)
    assert (found is None) == (reason is None), found
    assert (reason or "") in (found or "")
