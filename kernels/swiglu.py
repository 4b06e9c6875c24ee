# Triton's functions are untyped
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""SwiGLU of a fused gate and up projection in one launch. ``kernels.gate.swiglu`` is the torch twin."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import FLOATS, BadKernelInput, elements, expect, expect_device

_COLUMNS = 1024


# one compilation for every number of rows: it is a mask's alone
@triton.jit(do_not_specialize=["count"])
def swiglu_kernel(gate_up, out, count, width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Program (rows, columns)."""
    row = (tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows))[:, None]
    column = (tl.program_id(1) * columns + tl.arange(0, columns))[None, :]
    inside = (row < count) & (column < width)
    at = gate_up + row * (2 * width) + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    # by the exponential that cannot overflow
    small = tl.exp(-tl.abs(gate))
    result = gate * tl.where(gate >= 0, 1.0, small) / (1.0 + small) * up
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=inside)


def constants(width: int) -> dict[str, int]:
    """What ``swiglu_kernel`` is specialised to."""
    columns: int = min(_COLUMNS, triton.next_power_of_2(width))
    return {"width": width, "rows": max(1, elements(_COLUMNS) // columns), "columns": columns}


def write_swiglu(gate_up: Tensor) -> Tensor:
    """``gate_up`` [rows, 2 n], the gate first -> silu(gate) * up [rows, n]. Raises ``BadKernelInput``."""
    expect("gate_up", gate_up, (None, None), FLOATS, gate_up)
    expect_device(gate_up)
    rows, both = gate_up.shape
    if both < 2 or both % 2:
        raise BadKernelInput(f"gate_up has {both} columns, expected a gate and as much again")
    out = gate_up.new_empty(rows, both // 2)
    if rows:
        fixed = constants(both // 2)
        grid = (triton.cdiv(rows, fixed["rows"]), triton.cdiv(both // 2, fixed["columns"]))
        swiglu_kernel[grid](gate_up, out, rows, **fixed, num_warps=4)
    return out
