"""The benchmark measures whole steps at a tiny shape, keeps what it has, and says so where it cannot measure."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from app.memory.lanes import HostLanes
from app.model.config import ModelConfig, Rope
from app.model.torch_operations import TorchOperations
from kernels.bench import __main__ as program
from kernels.bench import attention, model, residents, timing
from kernels.bench.report import Row, append, show
from kernels.bench.timing import Repeated, interleaved
from kernels.bench.variants import WrongKernel
from tests.kernels.test_operations import CPU, pytestmark  # noqa: F401


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


def small(num_layers: int = 1) -> ModelConfig:
    return ModelConfig(
        hidden_size=32, intermediate_size=32, num_layers=num_layers, num_heads=2, num_kv_heads=1, head_dim=16,
        vocab_size=128, rms_norm_eps=1e-5, max_position_embeddings=64, rope=Rope(1e4), num_blocks=4,
        num_tokens=4, add_bos_embedding=True,
    )  # fmt: skip


def test_model_rows_at_a_tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small()
    given: dict[str, Any] = {
        "eight_b": lambda: config,
        "_DTYPE": torch.float32,
        "_UPDATE": 12,
        "COUNTS": (2, 9),
        "ceilings": lambda *_: (copy(), (copy()[0], 1.0)),
        "cuda_capture": lambda: lambda work: work,
        # three pools with copies, four without
        "_free": lambda _: program._RESERVE + 3 * 3920,
    }
    for name, value in given.items():
        monkeypatch.setattr(program, name, value)
    rows = {(row.what, row.case): row for row in program._model_rows(CPU, 1)}
    for form, fit in ((attention.COPIES, 2), (attention.ROTATING, 3)):
        assert rows[f"decode step, {form}: of its floor", "2 tenants"].value > 0
        assert rows[f"decode step, {form}: does not fit", "9 tenants"].value == fit
        assert rows[f"first token, {form}", "32-token prompt"].value > 0
    assert {what for what, _ in rows} >= {
        "ceiling: copy",
        "ceiling: pinned copy",
        "update, its write apart",
        "swap-in: of the pinned copy",
        "tenants resident at once, 8 bits",
    }


def test_weights_are_adapted_as_the_8b_checkpoints_are() -> None:
    """Rank 16, and the difference of two; on all projections but the attention's output."""
    (layer,) = model.random_weights(small(), torch.float32, CPU).layers
    ranks = {name: getattr(layer, name).down for name in ("qkv", "output", "gate_up", "down")}
    assert {name: None if down is None else len(down) for name, down in ranks.items()} == {
        "qkv": 3 * 32, "output": None, "gate_up": 2 * 32, "down": 32,
    }  # fmt: skip
    assert layer.down.up is not None
    assert layer.down.up.shape == (32, 32)
    rows = torch.randn(3, 32)
    assert not torch.equal(layer.qkv(rows, slice(0, 3)), layer.qkv(rows, None))


def test_a_pool_is_swapped_in_as_the_server_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[tuple[Tensor, Tensor]]] = []

    class Noted(HostLanes):
        def exchange(self, after: object, out: Any, back: Any) -> None:
            taken.append(list(back))
            super().exchange(after, out, taken[-1])

    config = small(num_layers=3)
    bench = model.Bench.make(
        config, model.random_weights(config, torch.float32, CPU), 1, TorchOperations, None
    )
    parts = bench.arena.pools.parts(1)
    for part in parts:
        part.fill_(7)
    monkeypatch.setattr(model, "lanes_of", lambda _, dtype: Noted(dtype))
    bring, plain, size = bench.swap_in()
    for part in parts:
        part.zero_()
    bring()
    assert all((part == 7).all() for part in parts)
    plain()
    # K and V of each layer, and the tail
    ((*layers, tail),) = taken
    assert len(layers) == 2 * config.num_layers
    assert all(tensor.is_contiguous() for pair in taken[0] for tensor in pair)
    assert torch.equal(tail[0], bench.memories[0].tail)
    assert size == bench.arena.bytes_per_pool(bench.backbone)


def test_tenants_are_counted_as_the_server_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H200's memory less the weights, whatever the shell that measures has set for a server."""
    monkeypatch.setenv("MEMORYLLM_MAX_RUNNING", "1")
    free = 143_771 * 2**20 - 2 * 8_030_000_000 - 2**30
    rows = {row.what: row for row in residents.rows(program.eight_b(), torch.bfloat16, CPU, free)}
    copies, eight = (rows[f"tenants resident at once, {form}"] for form in ("hot copy", "8 bits"))
    assert copies.value < (free - 2**30) / 1.8e9
    # a tenth of the pools' bytes, in copies of half a pool
    assert 10 <= int(copies.note.removesuffix(" of them read at once")) <= 0.2 * copies.value + 1
    assert eight.value > 1.7 * copies.value
    assert copies.reached == (copies.value >= 56)
    small = {row.what: row for row in residents.rows(program.eight_b(), torch.bfloat16, CPU, free // 2)}
    assert small["tenants resident at once, hot copy"].reached is False


# ------------------------------------------------------------ clocks, rows, and what is kept of them


def test_what_is_done_over_and_over_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(timing, "device_seconds", lambda work, _: [work(), 8.0][1])
    monkeypatch.setattr(timing, "seconds", lambda work, _: [work(), 3.0][1])
    work = {
        "graph": Repeated(lambda: calls.append("graph"), 8),
        "step": lambda: calls.append("step"),
        "plain": lambda: calls.append("plain"),
    }
    times = interleaved(work, CPU, 2, by_host=["step"])
    assert times == {"graph": 1.0, "step": 3.0, "plain": 8.0}
    # in turns, and once before it counts
    assert calls == ["graph", "step", "plain"] * 3


def test_a_graph_holds_the_work_eight_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    calls: list[None] = []
    repeated = timing.captured(lambda: calls.append(None), torch.device("cuda"))
    # and once before, to be compiled
    assert (repeated.times, len(calls)) == (8, 9)


def failing(error: Exception) -> Iterator[Row]:
    yield Row("a", "b", 2, "x")
    raise error


def test_rows_are_kept_as_they_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "bench.csv"
    full = torch.OutOfMemoryError("CUDA out of memory")
    halves = [("attention", failing(full)), ("model", iter([Row("c", "d", 1, "x")]))]
    assert program.measure(halves, table, "gpu") == 1
    assert [line[4] for line in csv.reader(table.read_text().splitlines())] == ["what", "a", "c"]
    seen = capsys.readouterr()
    assert "CUDA out of memory" in seen.err
    assert "c " in seen.out


def test_nothing_is_measured_behind_a_wrong_kernel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "bench.csv"
    halves = [("attention", failing(WrongKernel("4 x 1: off by 3"))), ("model", failing(ValueError()))]
    assert program.measure(halves, table, "gpu") == 1
    assert [line[4] for line in csv.reader(table.read_text().splitlines())] == ["what", "a"]
    assert "off by 3: nothing more is timed" in capsys.readouterr().err


def test_a_bound_that_is_missed_shows_in_the_status(tmp_path: Path) -> None:
    for value, status in ((2.0, 0), (1.0, 1)):
        rows = iter([Row("a", "b", value, "x", 1.5), Row("a", "c", 9, "x", 1.5)])
        assert program.measure([("model", rows)], tmp_path / "bench.csv", "gpu") == status


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("tests", "memory"), [(0, 0), (1, 0), (0, 9)])
def test_memory_errors_are_looked_for_whatever_the_tests_found(
    tmp_path: Path, tests: int, memory: int
) -> None:
    for name, does in {
        "python-of-the-gpu": f"exit {tests}",
        "compute-sanitizer": f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" > {tmp_path}/asked; exit {memory}',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    root = Path(__file__).parents[2]
    command = ["make", "-s", "test-gpu", "PYTHON=python-of-the-gpu"]
    done = subprocess.run(command, cwd=root, env=path, capture_output=True, timeout=60)
    assert (done.returncode != 0) == bool(tests or memory)
    caching, *asked = (tmp_path / "asked").read_text().split()
    assert caching == "1"
    assert "python-of-the-gpu" in asked


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("xdist", [False, True])
def test_the_gpus_tests_compile_in_parallel_where_that_is_installed(tmp_path: Path, xdist: bool) -> None:
    python = tmp_path / "python-of-the-gpu"
    python.write_text(f"""#!/bin/sh
        test "$1" = -c && exit {int(not xdist)}
        echo "$*" >> {tmp_path}/asked
    """)
    python.chmod(0o755)
    root = Path(__file__).parents[2]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "at_once": "from elsewhere"}
    command = ["make", "-s", "test-gpu", "PYTHON=python-of-the-gpu"]
    assert subprocess.run(command, cwd=root, env=path, capture_output=True, timeout=60).returncode == 0
    parallel = " -n 8" if xdist else ""
    first = (tmp_path / "asked").read_text().splitlines()[0]
    assert first == f"-m pytest -q -W default{parallel} tests/gpu"


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
