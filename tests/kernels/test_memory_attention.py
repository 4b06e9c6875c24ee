"""The attention kernels under Triton's interpreter, against float64 written out row by row."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from kernels.checks import INTERPRETED, BadKernelInput
from kernels.memory_attention import Rotation, Scratch, Tuning, merge_constants
from tests.kernels.cases import CACHE_ROWS, MIXED, Case, Reads, eight_bit

pytestmark = pytest.mark.skipif(
    tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7),
    reason="the interpreter of Triton 3.6 loops to a loaded bound by a conversion that NumPy has deprecated",
)


def test_the_kernels_run_in_the_interpreter() -> None:
    assert INTERPRETED


def test_what_a_case_makes_lies_where_the_case_does() -> None:
    """On a GPU too, where this file's tests do not run: here the CPU is not the default."""
    case = Case.random(MIXED)
    eight, given = eight_bit(case)
    with torch.device("meta"):
        made = [
            case.bias,
            case.hot_key,
            case.expected(),
            case.plan().buffer,
            case.run(),
            case.run(rotating=True),
        ]
        made += [eight.expected(), eight.run(rotating=True, **given)]
    assert {tensor.device.type for tensor in made} == {"cpu"}


@pytest.mark.parametrize("rotating", [False, True])
@pytest.mark.parametrize(
    ("group", "head_dim"),
    [(1, 16), (2, 64), (3, 80), (4, 128), (5, 32), (6, 48), (7, 16), (8, 96), (9, 256)],
)
def test_groups_and_head_sizes(group: int, head_dim: int, rotating: bool) -> None:
    reads: Reads = [(2, 0, 0, 5), (3, 1, 1, 1), (2, 0, 2, 12)]
    Case.random(reads, group=group, head_dim=head_dim).check(rotating=rotating)


@pytest.mark.parametrize("rotating", [False, True])
def test_tenants_versions_and_contexts_of_all_kinds(rotating: bool) -> None:
    """No pool, no context, two versions of a pool, two sequences of a tenant."""
    Case.random(MIXED, kv_heads=2).check(rotating=rotating)


@pytest.mark.parametrize("workers", [1, 2, 5, 40])
def test_any_number_of_workers(workers: int) -> None:
    Case.random(MIXED, workers=workers).check()


def test_as_many_workers_as_programs_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200: of three programs a multiprocessor, 49 for each of 8 heads; one for each of more heads than fit."""
    device = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    cuda = torch.device("cuda")
    assert [Tuning(32, 4, 3, programs).workers(8, cuda) for programs in (1, 2, 3)] == [16, 33, 49]
    assert Tuning(32, 4, 3).workers(133, cuda) == 1
    assert Tuning(32, 4, 3, 2).workers(8, torch.device("cpu")) == 3


@pytest.mark.parametrize(("slots", "spare"), [(1, 0), (16, 0), (17, 1), (33, 16), (48, 47)])
def test_pool_sizes_around_a_step(slots: int, spare: int) -> None:
    Case.random(MIXED[:3], slots=slots, spare=spare, workers=4).check()


def test_more_sequences_of_a_tenant_than_a_tile_holds() -> None:
    Case.random([(2, 0, i, i % 4) for i in range(9)], group=5).check()


def test_a_tile_of_many_rows() -> None:
    Case.random([(2, 0, i, 3) for i in range(9)], group=3, tile_rows=32).check()


@pytest.mark.parametrize("rotating", [False, True])
def test_prompts_see_their_context_causally(rotating: bool) -> None:
    """Two prompts and a decode row in one launch; the second chunk of a prompt begins where the first ended."""
    first: Reads = [(2, 0, 0, i + 1) for i in range(11)]
    second: Reads = [(3, 1, 1, i + 6) for i in range(7)]
    Case.random([*first, *second, (2, 0, 2, 4)], group=3).check(rotating=rotating)


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (2, 16), (4, 128), (5, 48), (9, 96)])
def test_eight_bit_pools(group: int, head_dim: int) -> None:
    case, given = eight_bit(Case.random(MIXED, group=group, head_dim=head_dim, kv_heads=2))
    out = case.run(rotating=True, **given)
    torch.testing.assert_close(out.double(), case.expected(), atol=2e-5, rtol=2e-5)


def test_eight_bit_pools_have_both_scales() -> None:
    case, given = eight_bit(Case.random(MIXED))
    for missing in ("key_scale", "value_scale"):
        halved = given | {"rotation": replace(given["rotation"], **{missing: None})}
        with pytest.raises(BadKernelInput):
            case.run(rotating=True, **halved)
    with pytest.raises(BadKernelInput, match="expected one of"):
        case.run(rotating=True, **(given | {"key": case.key}))


def test_half_precision() -> None:
    """float16, since the interpreter multiplies the bit patterns of bfloat16."""
    Case.random(MIXED, head_dim=32, dtype=torch.float16).check(tolerance=4e-3)


def test_more_segments_than_one_step_of_the_merge() -> None:
    case = Case.random([(2, 0, 0, 5)], slots=300, head_dim=256, group=1, workers=40)
    first, last = case.plan().rows[0, :2].tolist()
    assert last - first > merge_constants(case.shape, 1, 256)["chunk"]
    case.check()


def test_sharp_scores() -> None:
    case = Case.random(MIXED)
    replace(case, query=case.query * 40).check(tolerance=1e-5)


@pytest.mark.parametrize("rotating", [False, True])
def test_a_poisoned_pool_changes_nobody_else_by_a_bit(rotating: bool) -> None:
    case = Case.random(MIXED, kv_heads=2)
    clean = case.run(rotating=rotating)
    key, value = case.key.clone(), case.value.clone()
    key[1] = value[1] = torch.nan
    poisoned = replace(case, key=key, value=value).run(rotating=rotating)
    others = [i for i, read in enumerate(MIXED) if read[1] != 1]
    assert torch.equal(poisoned[others], clean[others])
    assert poisoned[[1, 5]].isnan().all()


def test_a_poisoned_context_changes_nobody_else_by_a_bit() -> None:
    case = Case.random(MIXED)
    table = case.table % (CACHE_ROWS - 1)
    table[2, :12] = CACHE_ROWS - 1
    case = replace(case, table=table)
    clean = case.run()
    cache_key, cache_value = case.cache_key.clone(), case.cache_value.clone()
    cache_key[-1] = cache_value[-1] = torch.nan
    poisoned = replace(case, cache_key=cache_key, cache_value=cache_value).run()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(poisoned[others], clean[others])
    assert poisoned[2].isnan().all()


def test_rows_that_the_plan_does_not_hold_become_zero() -> None:
    case = Case.random(MIXED)
    out = case.run(plan=case.plan(MIXED[:4]))
    assert (out[4:] == 0).all()
    torch.testing.assert_close(out[:4].double(), case.expected()[:4], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda t: t[:, :1].contiguous(), "heads"),
        ("query", lambda t: t[..., :15].contiguous(), "head size"),
        ("query", lambda t: t.repeat(3, 1, 1), "rows"),
        ("query", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), "not contiguous"),
        ("key", lambda t: t[:, :, 1:].contiguous(), "key has shape"),
        ("key", lambda t: t.double(), "key is torch.float64"),
        ("value", lambda t: t.bfloat16(), "value is torch.bfloat16"),
        ("value", lambda t: t.to("meta"), "value is on meta"),
        ("bias", lambda t: t[:2], "bias has shape"),
        ("bias", lambda _: None, "need a bias"),
        ("cache_key", lambda t: t[:, :, :8], "cache_key has shape"),
        ("cache_value", lambda t: t[1:], "cache_value has shape"),
        ("table", lambda t: t.float(), "table is torch.float32"),
        ("out", lambda t: t[1:], "out has shape"),
        ("scratch", lambda s: Scratch(s.partial[1:], s.normaliser), "scratch.partial has shape"),
        ("rotation", lambda _: Rotation(*[torch.zeros(1)] * 3, 0), "give no bias"),
    ],
)
def test_wrong_tensors_are_refused(name: str, change: Any, message: str) -> None:
    case = Case.random(MIXED)
    given = {
        "query": case.query,
        "key": case.hot_key,
        "value": case.value,
        "bias": case.bias,
        "cache_key": case.cache_key,
        "cache_value": case.cache_value,
        "table": case.table,
        "out": torch.empty_like(case.query),
        "scratch": Scratch.allocate(case.shape, 1, 16, "cpu"),
        "rotation": None,
    }
    with pytest.raises(BadKernelInput, match=message):
        case.run(**{name: change(given[name])})


def test_a_table_of_angles_that_is_too_short_is_refused() -> None:
    case = Case.random(MIXED)
    with pytest.raises(BadKernelInput, match="end before"):
        case.run(rotating=True, rotation=Rotation(case.rank, case.cos[:-1], case.sin[:-1], 1))
