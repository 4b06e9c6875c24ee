"""Every kernel on the device, in bfloat16, float16 and float32, against its twin in float64."""

from __future__ import annotations

import pytest
import torch

from kernels.hot_copy import write_hot_copy
from kernels.rotate import rotate_pool
from kernels.update_write import project_memory
from kernels.write_block import spare_slots, write_block
from tests.kernels.cases import MIXED, Case, Reads, eight_bit
from tests.kernels.row_cases import check_add_norm, check_rotate_rows, check_swiglu

# averages of unit normals: a rounding of the inputs, and one of the output
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)
GROUPS = [(1, 16), (2, 64), (3, 80), (4, 128), (5, 32), (6, 48), (7, 16), (8, 96), (9, 128)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotating", [False, True])
@pytest.mark.parametrize(("group", "head_dim"), GROUPS)
def test_small_attention(group: int, head_dim: int, rotating: bool, dtype: torch.dtype) -> None:
    case = Case.random(MIXED, group=group, head_dim=head_dim, kv_heads=2, dtype=dtype, device="cuda")
    case.check(rotating=rotating, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("rotating", [False, True])
@pytest.mark.parametrize("tile_rows", [16, 64, 128])
def test_attention_at_the_8b_models_heads(tile_rows: int, rotating: bool) -> None:
    prompts: Reads = [(2, 0, 0, i + 1) for i in range(12)]
    case = Case.random(
        [*MIXED, *prompts], slots=1313, spare=256, kv_heads=8, group=4, head_dim=128,
        workers=33, tile_rows=tile_rows, dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    case.check(rotating=rotating, tolerance=TOLERANCE[torch.bfloat16])


def test_wide_heads() -> None:
    case = Case.random(MIXED, group=2, head_dim=256, dtype=torch.bfloat16, device="cuda")
    case.check(tolerance=TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(("group", "head_dim"), GROUPS)
def test_small_eight_bit_attention(group: int, head_dim: int) -> None:
    case, given = eight_bit(Case.random(MIXED, group=group, head_dim=head_dim, kv_heads=2, device="cuda"))
    out = case.run(rotating=True, **given)
    torch.testing.assert_close(out.double(), case.expected(), atol=2e-4, rtol=2e-4)


def test_small_nan_stays_in_its_pool() -> None:
    case = Case.random(MIXED, kv_heads=2, dtype=torch.bfloat16, device="cuda")
    clean = case.run(rotating=True)
    case.key[1] = case.value[1] = torch.nan
    poisoned = case.run(rotating=True)
    others = [i for i, read in enumerate(MIXED) if read[1] != 1]
    assert torch.equal(poisoned[others], clean[others])
    assert poisoned[[1, 5]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 48, 80, 128, 256])
def test_small_hot_copy(head_dim: int, dtype: torch.dtype) -> None:
    case = Case.random(MIXED, kv_heads=2, head_dim=head_dim, dtype=dtype, device="cuda")
    key, rank = case.key[[1, 2, 0, 1]], case.rank
    exact = torch.empty_like(key, dtype=torch.float64)
    rotate_pool(key.double(), rank, case.cos.double(), case.sin.double(), 1, exact)
    out = torch.full_like(key, torch.nan)
    write_hot_copy(key, rank, case.cos, case.sin, 1, out)
    held = (rank >= 0)[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[held].double(), exact[held], atol=TOLERANCE[dtype], rtol=1e-2)
    assert (out[~held] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "width", "kv_heads", "head_dim"), [(1, 32, 1, 16), (7, 100, 1, 80), (256, 4096, 8, 128)]
)
def test_small_write_block(tokens: int, width: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda").to(dtype)

    pool_slots = 3 * tokens + 1
    hidden, norm = normal(tokens, width) * 3, normal(width).abs() + 0.5
    weight = normal(2 * kv_heads * head_dim, width) * width**-0.5
    key, value = (
        torch.full((kv_heads, pool_slots, head_dim), torch.nan, dtype=dtype, device="cuda") for _ in range(2)
    )
    slots = spare_slots(torch.randperm(pool_slots)[None, :tokens], pool_slots, "cuda")[0]
    write_block(hidden, norm, 1e-5, weight, None, slots, key, value)
    exact = project_memory(hidden.double(), norm.double(), 1e-5, weight.double(), None, kv_heads)
    for written, expected in zip((key, value), exact, strict=True):
        torch.testing.assert_close(
            written[:, slots.long()].double(), expected, atol=5 * TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )
        others = torch.ones(pool_slots, dtype=torch.bool, device="cuda")
        others[slots.long()] = False
        assert written[:, others].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adding", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 192), (2, 1000), (65, 4096), (1, 32_768)])
def test_small_sums_and_norms(rows: int, width: int, adding: bool, dtype: torch.dtype) -> None:
    check_add_norm(rows, width, adding=adding, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 576), (65, 14_336)])
def test_small_gates(rows: int, width: int, dtype: torch.dtype) -> None:
    check_swiglu(rows, width, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "reads", "heads", "kv_heads", "head_dim"),
    [(1, 1, 1, 1, 64), (5, 3, 3, 3, 80), (4, 0, 8, 2, 48), (65, 65, 32, 8, 128), (2, 1, 9, 1, 256)],
)
def test_small_rotated_rows(
    rows: int, reads: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    check_rotate_rows(rows, reads, heads, kv_heads, head_dim, dtype, "cuda")
