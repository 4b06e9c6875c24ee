"""The benchmark runs whole at a tiny shape, times no wrong kernel, and says so where it cannot measure."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.model.config import ModelConfig, Rope
from app.model.kernel_operations import KernelOperations
from app.model.operations import Sizes
from kernels.bench import __main__ as program
from kernels.bench import attention, model
from kernels.bench.report import Row, append, show
from tests.kernels.test_operations import CPU, pytestmark  # noqa: F401

TINY = attention.Shape(layers=1, kv_heads=1, group=2, head_dim=16, pool=32, block=8, context=5)


def copy() -> tuple[Callable[[], object], int]:
    tensor = torch.zeros(100)
    return (lambda: tensor.clone()), 800


def test_nothing_is_measured_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    table = tmp_path / "bench.csv"
    assert program.main(["--csv", str(table)]) == 2
    assert "nothing was measured" in capsys.readouterr().err
    assert not table.exists()


def test_attention_rows_at_a_tiny_shape() -> None:
    cases = (attention.Case(1, 1), attention.Case(1, 3), attention.Case(4, 1))
    rows = list(attention.rows(TINY, cases, torch.float32, CPU, copy(), 1))
    # four variants and one against sdpa a case, and one for sequences that share
    assert len(rows) == 5 * len(cases) + 1
    bounded = {(row.what, row.case) for row in rows if row.least is not None}
    assert ("attention: time against one sequence", "1 x 3") in bounded
    assert ("attention, hot copy: of the copy bandwidth", "4 x 1") in bounded
    assert all(row.value > 0 for row in rows)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.memory_attention

    def wrong(query: Tensor, *rest: Any, **named: Any) -> None:
        right(-query, *rest, **named)

    monkeypatch.setattr(attention, "memory_attention", wrong)
    with pytest.raises(attention.WrongKernel, match="hot copy: off by"):
        list(attention.rows(TINY, (attention.Case(1, 1),), torch.float32, CPU, copy(), 1))


def test_model_rows_at_a_tiny_shape() -> None:
    config = ModelConfig(
        hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
        vocab_size=128, rms_norm_eps=1e-5, max_position_embeddings=64, rope=Rope(1e4), num_blocks=4,
        num_tokens=4, add_bos_embedding=True,
    )  # fmt: skip
    weights = model.random_weights(config, torch.float32, CPU)
    sizes = Sizes(rows=40, sequences=2, context=1 + model.ROOM)
    make = partial(KernelOperations, sizes=sizes)
    bench = model.Bench.make(config, weights, 2, make, lambda work: work)
    rows = {
        (row.what, row.case): row
        for row in model.rows(bench, weights, (1, 2, 9), 12, copy(), (copy()[0], 1.0), 1)
    }
    assert rows["decode step: of its floor", "2 tenants"].value > 0
    assert rows["decode step: does not fit", "9 tenants"].value == 2
    assert {what for what, _ in rows} >= {
        "first token",
        "update, its write apart",
        "swap-in: of the pinned copy",
    }


def test_rows_say_whether_they_reach_their_bounds(tmp_path: Path) -> None:
    good, bad = Row("a", "b", 2, "x", 1.5, 4), Row("a", "c", 2, "ms", 1.5, 1, less=True)
    assert good.reached
    assert bad.reached is False
    assert Row("a", "d", 1, "").reached is None
    assert "MISSED" in show(bad)
    assert "MISSED" not in show(good)
    table = tmp_path / "bench.csv"
    for _ in range(2):
        append(table, "gpu", [good])
    lines = list(csv.reader(table.read_text().splitlines()))
    assert len(lines) == 3
    assert lines[1][4:9] == ["a", "b", "2", "x", "1.5"]
