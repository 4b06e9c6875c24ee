"""The block-writing kernel under Triton's interpreter, against its torch twin in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.checks import BadKernelInput
from kernels.update_write import project_memory
from kernels.write_block import spare_slots, write_block

EPS = 1e-5


def inputs(tokens: int, width: int, kv_heads: int, head_dim: int, biased: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens + width)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    pool_slots = 3 * tokens + 1
    slots = torch.randperm(pool_slots, generator=generator)[None, :tokens]
    return {
        "hidden": normal(tokens, width) * 3,
        "norm": normal(width).abs() + 0.5,
        "eps": EPS,
        "weight": normal(2 * kv_heads * head_dim, width),
        "bias": normal(2 * kv_heads * head_dim) if biased else None,
        "slots": spare_slots(slots, pool_slots, "cpu")[0],
        "key": torch.full((kv_heads, pool_slots, head_dim), torch.nan),
        "value": torch.full((kv_heads, pool_slots, head_dim), torch.nan),
    }


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("tokens", "width", "kv_heads", "head_dim"),
    [(1, 32, 1, 16), (5, 40, 3, 64), (7, 100, 1, 80), (70, 33, 2, 16), (3, 64, 1, 128)],
)
def test_against_the_twin(tokens: int, width: int, kv_heads: int, head_dim: int, biased: bool) -> None:
    given = inputs(tokens, width, kv_heads, head_dim, biased)
    write_block(**given)
    norm, weight = given["norm"].double(), given["weight"].double()
    bias = given["bias"].double() if biased else None
    expected = project_memory(given["hidden"].double(), norm, EPS, weight, bias, kv_heads)
    slots = given["slots"].long()
    others = torch.ones(given["key"].shape[1], dtype=torch.bool)
    others[slots] = False
    for written, exact in zip((given["key"], given["value"]), expected, strict=True):
        torch.testing.assert_close(written[:, slots].double(), exact, atol=1e-4, rtol=1e-5)
        assert written[:, others].isnan().all(), "a slot that is being read was written"


def test_a_row_has_the_same_bits_alone_and_in_a_block() -> None:
    """A pool projected again from the store must be the one that was written block by block."""
    whole = inputs(9, 40, 2, 16, False)
    write_block(**whole)
    alone = whole | {
        "hidden": whole["hidden"][4:5],
        "slots": whole["slots"][4:5],
        "key": torch.full_like(whole["key"], torch.nan),
        "value": torch.full_like(whole["value"], torch.nan),
    }
    write_block(**alone)
    slot = int(whole["slots"][4])
    assert torch.equal(alone["key"][:, slot], whole["key"][:, slot])
    assert torch.equal(alone["value"][:, slot], whole["value"][:, slot])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hidden", lambda t: t.long(), "hidden is torch.int64"),
        ("hidden", lambda t: t[:, 1:], "not contiguous"),
        ("norm", lambda t: t[1:], "norm has shape"),
        ("weight", lambda t: t[1:], "weight has shape"),
        ("weight", lambda t: t.half(), "weight is torch.float16"),
        ("bias", lambda t: t[1:], "bias has shape"),
        ("slots", lambda t: t.long(), "slots is torch.int64"),
        ("slots", lambda t: t[1:], "slots has shape"),
        ("key", lambda t: t[..., :8].contiguous(), "value has shape"),
        ("value", lambda t: t.to("meta"), "value is on meta"),
    ],
)
def test_wrong_tensors_are_refused(name: str, change: Any, message: str) -> None:
    given = inputs(3, 40, 2, 16, True)
    given[name] = change(given[name])
    with pytest.raises(BadKernelInput, match=message):
        write_block(**given)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (torch.tensor([[0, 9]]), "within 0 to 8"),
        (torch.tensor([[-1, 2]]), "within 0 to 8"),
        (torch.tensor([[4, 4]]), "twice"),
        (torch.tensor([[0.5]]), "integers"),
        (torch.tensor([0, 1]), "integers"),
    ],
)
def test_slots_outside_the_pool_are_refused(slots: torch.Tensor, message: str) -> None:
    with pytest.raises(BadKernelInput, match=message):
        spare_slots(slots, 9, "cpu")
