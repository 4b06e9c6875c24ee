"""``python -m kernels.bench``; see the package."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import triton

from app.model.config import ModelConfig, Rope
from app.model.kernel_operations import KernelOperations
from app.model.operations import Sizes
from app.model.pools import PoolForm
from app.worker.graphs import cuda_capture
from app.worker.rows import Rows
from kernels.bench import attention, model
from kernels.bench.report import Row, append, show
from kernels.bench.timing import Work

COUNTS = (1, 16, 64)
_UPDATE = 512
_RESERVE = 6 * 2**30


def eight_b() -> ModelConfig:
    """The published 8B model's shape."""
    return ModelConfig(
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128_256,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope=Rope(500_000.0, "linear", 1.8125),
        num_blocks=50,
        num_tokens=256,
        add_bos_embedding=True,
        drop_memory_per_layer=True,
    )


def ceilings(device: torch.device, elements: int, side: int) -> tuple[tuple[Work, int], tuple[Work, float]]:
    """A copy with the bytes it reads and writes, a product of square matrices with its operations."""
    big = torch.zeros(elements, dtype=torch.bfloat16, device=device)
    other = torch.empty_like(big)
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    return (lambda: other.copy_(big), 2 * big.nbytes), (lambda: left @ right, 2.0 * side**3)


def _model_rows(device: torch.device, rounds: int) -> list[Row]:
    """The whole model's rows, with as many tenants as fit beside the weights."""
    config, dtype = eight_b(), torch.bfloat16
    sizes = Sizes(rows=_UPDATE, sequences=max(COUNTS), context=1 + Rows.rounded(model.ROOM))
    copy, matmul = ceilings(device, 2**29, 8192)
    weights = model.random_weights(config, dtype, device)
    free = torch.cuda.mem_get_info()[0] - _RESERVE
    forms = {"bf16": (PoolForm(), 56, 70), "8 bits": (PoolForm(copies=False, eight_bit=True), 100, 135)}
    # a reader's copy is the running batch's, a pool every tenant's
    rows = [
        Row("tenants resident at once", name, free // form.pool_bytes(config, dtype), "tenants", least, aim)
        for name, (form, least, aim) in forms.items()
    ]
    each = PoolForm().pool_bytes(config, dtype) + PoolForm().copy_bytes(config, dtype)
    tenants = min(max(COUNTS), free // each - 1)
    bench = model.Bench.make(config, weights, tenants, partial(KernelOperations, sizes=sizes), cuda_capture())
    rows += model.rows(bench, weights, COUNTS, _UPDATE, copy, matmul, rounds)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--csv", type=Path, default=Path("bench.csv"))
    parser.add_argument("--only", choices=("attention", "model"), help="default: both")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU is here: nothing was measured", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = torch.device("cuda")
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    rows: list[Row] = []
    if given.only != "model":
        copy, _ = ceilings(device, 2**29, 16)
        try:
            for row in attention.rows(
                attention.Shape(), attention.CASES, torch.bfloat16, device, copy, given.rounds
            ):
                rows.append(row)
                print(show(row), flush=True)
        except attention.WrongKernel as error:
            print(f"{error}: nothing more is timed", file=sys.stderr)
            append(given.csv, name, rows)
            return 1
    if given.only != "attention":
        for row in _model_rows(device, given.rounds):
            rows.append(row)
            print(show(row), flush=True)
    append(given.csv, name, rows)
    return int(any(row.reached is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
