"""The benchmark of attention runs whole at a tiny shape, and refuses wrong kernels at a large one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.bench import attention, pools, variants
from kernels.bench.pools import Data, Shape
from kernels.bench.variants import TOLERANCE, WrongKernel
from kernels.memory_attention import Rotation
from kernels.rotate import rotate_pool
from tests.kernels.test_bench import copy
from tests.kernels.test_operations import CPU, pytestmark  # noqa: F401

TINY = Shape(pools=1, kv_heads=1, group=2, head_dim=16, pool=32, block=8, context=5)
# one head of the 8B model's, as far as an output's size goes
LARGE = Shape(pools=1, kv_heads=1, group=4, head_dim=32, pool=12_800, block=256, context=64)


ALONE = "hot copy, one sequence"


def test_attention_rows_at_a_tiny_shape() -> None:
    cases = (attention.Case(1, 1), attention.Case(1, 3), attention.Case(4, 1))
    # what names no device would be made elsewhere, as on a GPU's machine
    with torch.device("meta"):
        rows = list(attention.rows(TINY, cases, torch.float32, CPU, copy(), 1))
    # four variants and one against sdpa a case, and one for sequences that share
    assert len(rows) == 5 * len(cases) + 1
    bounded = {(row.what, row.case) for row in rows if row.least is not None}
    assert ("attention: time against one sequence", "1 x 3") in bounded
    assert ("attention, hot copy: of the copy bandwidth", "4 x 1") in bounded
    assert all(row.value > 0 for row in rows)


def test_many_sequences_and_one_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noted(work: dict[str, Any], *_: Any) -> dict[str, float]:
        seen.append(set(work))
        return {name: 3.0 if name == attention.COPIES else 2.0 for name in work}

    monkeypatch.setattr(attention, "interleaved", noted)
    monkeypatch.setattr(attention, "check", lambda *_: None)
    rows = list(attention.rows(TINY, (attention.Case(1, 3),), torch.float32, CPU, copy(), 1))
    assert seen == [
        {*(attention.COPIES, attention.ROTATING, attention.EIGHT_BIT, attention.SDPA), "copy", ALONE}
    ]
    assert rows[-1].value == 1.5


def test_pools_of_all_tenants_are_larger_than_a_cache() -> None:
    shape = Shape()
    each = 2 * shape.kv_heads * shape.slots * shape.head_dim
    for case in attention.CASES:
        assert shape.layers(case.tenants) * case.tenants * each > 800e6


def test_spare_slots_are_poisoned_and_left_out_of_what_torch_is_given() -> None:
    data = Data.random(TINY, 2, 1, torch.float32, CPU)
    for tensor in (data.key, data.value):
        poisoned = tensor.isnan().all(dim=-1).all(dim=2)
        assert torch.equal(poisoned, data.rank < 0)
        assert int(poisoned.sum()) == data.layers * 2 * TINY.block
    assert data.scale.isfinite().all()
    gathered = data.gathered(data.value)
    assert gathered.shape == (1, 2, 1, TINY.pool, TINY.head_dim)
    slot = int((data.rank[0, 1] == 7).nonzero())
    assert torch.equal(gathered[0, 1, :, 7], data.value[0, 1, :, slot])


# ------------------------------------------------------------ wrong kernels


def off_by(data: Data, variant: variants.Variant) -> float:
    """The largest difference from the exact output, in no units of its own."""
    variant.attend(0)
    exact = variants.reference(
        data.query[0].double(), variant.key[0].double(), variant.value[0].double(), data.rank[0] >= 0,
        data.cache_key[0].double(), data.cache_value[0].double(), data.table, [0], [0], [0], [variant.limit],
    )  # fmt: skip
    return float((variant.out.double() - exact).abs().max())


Mistake = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def in_torch(mistake: Mistake | None) -> Callable[..., None]:
    """``memory_attention`` of one pool, for one sequence, with a mistake in what is visible of pool and context."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, cache_key: Tensor, cache_value: Tensor,
        table: Tensor, plan: object, scratch: object, out: Tensor, *, rotation: Rotation | None = None,
        compiled: object = None,
    ) -> None:  # fmt: skip
        wide = [tensor[0].float() for tensor in (key, value)]
        if rotation is None:
            assert bias is not None
            visible = bias[0] == 0
        else:
            visible = rotation.rank[0] >= 0
            if rotation.key_scale is not None and rotation.value_scale is not None:
                wide[0] = wide[0] * rotation.key_scale[:, None]
                wide[1] = wide[1] * rotation.value_scale[0][..., None]
            turned = torch.empty_like(wide[0])[None]
            angles = rotation.cos.float(), rotation.sin.float()
            rotate_pool(wide[0][None], rotation.rank, *angles, rotation.first_position, turned)
            wide[0] = turned[0]
        context = torch.ones(table.shape[1], dtype=torch.bool)
        weight = torch.ones(())
        if mistake is not None:
            visible, context, weight = mistake(visible, context, weight)
        rows = table[0, context].long()
        keys = torch.cat([wide[0][:, visible], cache_key[rows].float().transpose(0, 1)], dim=1)
        values = torch.cat([wide[1][:, visible], cache_value[rows].float().transpose(0, 1)], dim=1)
        scores = query[0].float()[None] @ keys.transpose(1, 2) * query.shape[-1] ** -0.5
        out[0] = ((scores.softmax(dim=-1) @ values)[0] * weight).to(out.dtype)

    return attend


def ignores_the_context(visible: Tensor, context: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return visible, torch.zeros_like(context), weight


def loses_a_share(visible: Tensor, context: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    cut = visible.clone()
    cut[: len(cut) // 33] = False
    return cut, context, weight


def reads_spare_slots(visible: Tensor, context: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones_like(visible), context, weight


def writes_zeros(visible: Tensor, context: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return visible, context, weight * 0


@pytest.fixture
def all_in_torch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing of the large shape is left to the interpreter, which takes minutes for it."""

    def rotated(key: Tensor, rank: Tensor, cos: Tensor, sin: Tensor, first: int, out: Tensor) -> None:
        wide = torch.empty_like(out, dtype=torch.float32)
        rotate_pool(key.float(), rank, cos.float(), sin.float(), first, wide)
        out.copy_(wide.masked_fill_((rank < 0)[:, None, :, None], 0))

    torch.manual_seed(0)
    monkeypatch.setattr(pools, "write_hot_copy", rotated)
    return monkeypatch


def of_all_forms(data: Data) -> dict[str, variants.Variant]:
    forms: list[dict[str, bool]] = [
        {"rotating": False}, {"rotating": True}, {"rotating": True, "eight_bit": True},
    ]  # fmt: skip
    return {str(form): variants.of_kernel(data, 1, **form) for form in forms}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_no_mistake(all_in_torch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    all_in_torch.setattr(variants, "memory_attention", in_torch(None))
    data = Data.random(LARGE, 1, 1, dtype, CPU)
    for name, variant in of_all_forms(data).items():
        variants.check(name, data, variant)
        # there is room for a kernel that adds up in another order, and no more
        assert variants.error(data, variant, 0) < 0.7 * TOLERANCE[dtype]
    variants.check("sdpa", data, variants.of_sdpa(data, 1))


@pytest.mark.parametrize(
    "mistake", [ignores_the_context, loses_a_share, reads_spare_slots, writes_zeros], ids=lambda m: m.__name__
)
def test_a_wrong_kernel_is_refused_however_small_its_outputs_are(
    all_in_torch: pytest.MonkeyPatch, mistake: Mistake
) -> None:
    """In bfloat16, whose tolerance is the widest."""
    data = Data.random(LARGE, 1, 1, torch.bfloat16, CPU)
    all_in_torch.setattr(variants, "memory_attention", in_torch(mistake))
    for name, variant in of_all_forms(data).items():
        with pytest.raises(WrongKernel, match="off by"):
            variants.check(name, data, variant)
    if mistake in (ignores_the_context, loses_a_share):
        assert off_by(data, variants.of_kernel(data, 1, rotating=False)) < 1e-2


def test_torchs_own_attention_is_checked_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = variants.F.scaled_dot_product_attention

    def late(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
        return whole(query, key[:, :, 4:], value[:, :, 4:], **named)

    monkeypatch.setattr(variants.F, "scaled_dot_product_attention", late)
    with pytest.raises(WrongKernel, match="1 x 1, sdpa, pool alone: off by"):
        list(attention.rows(TINY, (attention.Case(1, 1),), torch.float32, CPU, copy(), 1))


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = variants.memory_attention

    def wrong(query: Tensor, *rest: Any, **named: Any) -> None:
        right(-query, *rest, **named)

    monkeypatch.setattr(variants, "memory_attention", wrong)
    with pytest.raises(WrongKernel, match="hot copy: off by"):
        list(attention.rows(TINY, (attention.Case(1, 1),), torch.float32, CPU, copy(), 1))
