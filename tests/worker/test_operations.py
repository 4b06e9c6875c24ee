"""What serves where kernels cannot, and 8-bit pools in torch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from structlog.testing import capture_logs

from app.model.operations import Sizes
from app.model.torch_operations import TorchOperations
from app.worker.operations import operations_for
from tests.harness import Harness, load_backbone
from tests.model.test_parity import all_logits

SIZES = Sizes(rows=8, sequences=4, context=273)


@pytest.mark.usefixtures("all_logs")
@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels would serve")
def test_a_gpu_without_kernels_is_served_by_torch_with_one_warning() -> None:
    backbone, _ = load_backbone("plain")
    make = operations_for(SIZES, rotating=False, eight_bit=False)
    with capture_logs() as logs:
        made = make(backbone.config, backbone.rope, torch.bfloat16, torch.device("cuda"))
    assert isinstance(made, TorchOperations)
    assert [line["log_level"] for line in logs] == ["warning"]
    assert logs[0]["reason"]


@pytest.mark.usefixtures("all_logs")
def test_a_cpu_is_served_by_torch_without_a_word() -> None:
    backbone, _ = load_backbone("plain")
    make = operations_for(SIZES, rotating=True, eight_bit=True)
    with capture_logs() as logs:
        made = make(backbone.config, backbone.rope, torch.float32, torch.device("cpu"))
    assert isinstance(made, TorchOperations)
    assert made.form.eight_bit
    assert logs == []


def test_eight_bit_pools_take_less_room_and_answer_almost_alike() -> None:
    """An evicted, warmed and reloaded 8-bit memory gives the very logits it gave before."""
    context, prompt = list(range(20, 60)), [9, 8, 7]
    exact = Harness(load_backbone("plain")[0])
    backbone, _ = load_backbone("plain", operations=partial(TorchOperations, eight_bit=True))
    coarse = Harness(backbone, slots=1, warm_bytes=10**8)
    logits = []
    for each in (exact, coarse):
        each.update("ada", context)
        logits.append(all_logits(each, "ada", prompt))
    error = (logits[0] - logits[1]).abs().max()
    assert 0 < error < 0.1 * logits[0].std()
    pools = coarse.engine.arena.pools
    assert pools.key.dtype == pools.value.dtype == torch.int8
    form = coarse.engine.arena.form
    # a head of 16 values and a scale of 4 bytes for V: 36 bytes in place of 128
    assert form.pool_bytes(backbone.config, torch.float32) * 128 == 36 * sum(
        t.nbytes for t in exact.engine.arena.pools.parts(0)
    )
    for _ in range(2):
        coarse.generate("ben", prompt, 1)
        assert coarse.engine.residency.get("ada") is None
        torch.testing.assert_close(all_logits(coarse, "ada", prompt), logits[1], atol=0, rtol=0)
