"""The kernels between a layer's products under Triton's interpreter, against their torch twins in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels.add_norm import MOST_COLUMNS, add_norm
from kernels.checks import BadKernelInput
from kernels.rotate_rows import write_rotated_rows
from kernels.swiglu import write_swiglu
from tests.kernels.row_cases import check_add_norm, check_rotate_rows, check_swiglu

# numpy, which the interpreter computes with, has no bfloat16
DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adding", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (3, 192), (2, 1000), (5, 4096)])
def test_sums_and_norms(rows: int, width: int, adding: bool, dtype: torch.dtype) -> None:
    check_add_norm(rows, width, adding=adding, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(0, 3), (1, 1), (3, 576), (2, 1024), (2, 1500)])
def test_gates(rows: int, width: int, dtype: torch.dtype) -> None:
    check_swiglu(rows, width, dtype)


def test_a_gate_that_is_far_off_neither_opens_nor_breaks() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, -0.0, 3.0, 2.0, 5.0]])
    torch.testing.assert_close(write_swiglu(gate_up), torch.tensor([[0.0, 400.0, 0.0]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "reads", "heads", "kv_heads", "head_dim"),
    [(0, 0, 2, 1, 16), (1, 1, 1, 1, 64), (5, 3, 3, 3, 80), (4, 0, 8, 2, 48), (3, 3, 32, 8, 128), (2, 1, 9, 1, 256)],
)  # fmt: skip
def test_rotated_rows(
    rows: int, reads: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    check_rotate_rows(rows, reads, heads, kv_heads, head_dim, dtype)


def rotated(**changed: Callable[[torch.Tensor], torch.Tensor]) -> None:
    given = {
        "qkv": torch.zeros(4, 6 * 16),
        "cos": torch.ones(4, 16),
        "sin": torch.ones(4, 16),
        "write_rows": torch.tensor([1, 2]),
        "cache_key": torch.zeros(3, 2, 16),
        "cache_value": torch.zeros(3, 2, 16),
    }
    for name, change in changed.items():
        given[name] = change(given[name])
    write_rotated_rows(**given)


@pytest.mark.parametrize("place", [-1, 3, 2**40])
def test_a_row_outside_the_cache_is_not_written(place: int) -> None:
    # a cache in the middle of memory that belongs to others
    around = torch.full((9, 2, 16), torch.nan)
    rotated(
        write_rows=lambda _: torch.tensor([1, place]),
        cache_key=lambda _: around[3:6],
        cache_value=lambda _: around[3:6],
    )
    assert around[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().all()
    assert (around[4] == 0).all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qkv", lambda t: t[0], "qkv has shape"),
        ("qkv", lambda t: t[:, :-1], "not contiguous"),
        ("qkv", lambda t: t[:, :64].contiguous(), "qkv has 64 columns"),
        ("qkv", lambda t: t[:, :90].contiguous(), "qkv has 90 columns"),
        ("qkv", lambda t: t.double(), "qkv is torch.float64"),
        ("cos", lambda t: t[1:], "cos has shape"),
        ("sin", lambda t: t.half(), "sin is torch.float16"),
        ("write_rows", lambda t: t.int(), "write_rows is torch.int32"),
        ("write_rows", lambda t: t.repeat(3), "write_rows has 6 rows"),
        ("cache_key", lambda t: t[..., :15], "head size"),
        ("cache_key", lambda t: t.transpose(0, 1), "not contiguous|cache_value has shape"),
        ("cache_value", lambda t: t[1:], "cache_value has shape"),
    ],
)
def test_wrong_rows_are_refused(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    with pytest.raises(BadKernelInput, match=message):
        rotated(**{name: change})


def test_wrong_sums_and_gates_are_refused() -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    for given, message in (
        ((x[0], None, weight), "x has shape"),
        ((x, x[:1], weight), "delta has shape"),
        ((x, x.half(), weight), "delta is"),
        ((x, None, weight[1:]), "weight has shape"),
        ((x.t(), None, weight[:2]), "not contiguous"),
        ((torch.empty(0, MOST_COLUMNS + 1), None, torch.empty(MOST_COLUMNS + 1)), "rows of 32769"),
    ):
        with pytest.raises(BadKernelInput, match=message):
            add_norm(*given, 1e-5)
    for wrong, message in ((x[0], "shape"), (x[:, :7].contiguous(), "7 columns"), (x.t(), "not contiguous")):
        with pytest.raises(BadKernelInput, match=message):
            write_swiglu(wrong)
