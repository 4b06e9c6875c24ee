# Triton's functions are untyped
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The residual sum and the RMSNorm behind it in one launch. ``kernels.norm.add_rms_norm`` is the torch twin.

Of a decode step's launches most do next to nothing, and each costs two microseconds however little it does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import FLOATS, BadKernelInput, elements, expect, expect_device

# a program holds whole rows
MOST_COLUMNS = 2**15


# one compilation for every number of rows: it is a mask's alone
@triton.jit(do_not_specialize=["count"])
def add_norm_kernel(
    x,
    delta,
    weight,
    total,
    normed,
    count,
    eps,
    width: tl.constexpr,
    padded: tl.constexpr,
    rows: tl.constexpr,
    adding: tl.constexpr,
):
    """Program (rows)."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.arange(0, padded)
    at = row[:, None] * width + column[None, :]
    inside = (row < count)[:, None] & (column < width)[None, :]
    summed = tl.load(x + at, mask=inside, other=0.0)
    if adding:
        other = tl.load(delta + at, mask=inside, other=0.0)
        # rounded before it is normed, as the next sum will find it
        summed = (summed.to(tl.float32) + other.to(tl.float32)).to(summed.dtype)
        tl.store(total + at, summed, mask=inside)
    wide = summed.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / width + eps)
    by = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(normed + at, (wide * scale[:, None] * by[None, :]).to(normed.dtype.element_ty), mask=inside)


def constants(width: int, *, adding: bool) -> dict[str, object]:
    """What ``add_norm_kernel`` is specialised to."""
    padded: int = triton.next_power_of_2(width)
    return {"width": width, "padded": padded, "rows": max(1, elements(2048) // padded), "adding": adding}


def warps(width: int) -> int:
    """Warps for a row of ``width``: sixteen elements a thread, so that all of a row is asked for at once."""
    padded: int = triton.next_power_of_2(width)
    return min(16, max(4, padded // 512))


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` + ``delta`` (``x`` itself if that is None) and its RMSNorm times ``weight`` [d], each [rows, d].

    ``x`` and ``delta`` [rows, d]. Raises ``BadKernelInput``.
    """
    expect("x", x, (None, None), FLOATS, x)
    expect_device(x)
    rows, width = x.shape
    expect("weight", weight, (width,), (x.dtype,), x)
    if not 1 <= width <= MOST_COLUMNS:
        raise BadKernelInput(f"rows of {width}, expected 1 to {MOST_COLUMNS}")
    if delta is not None:
        expect("delta", delta, (rows, width), (x.dtype,), x)
    total = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    if rows:
        fixed = constants(width, adding=delta is not None)
        add_norm_kernel[(triton.cdiv(rows, fixed["rows"]),)](
            x,
            x if delta is None else delta,
            weight,
            total,
            normed,
            rows,
            eps,
            **fixed,
            num_warps=warps(width),
        )
    return total, normed
