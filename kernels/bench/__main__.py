"""``python -m kernels.bench``; see the package."""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Iterable, Iterator
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
from kernels.bench import attention, model, residents, sweep
from kernels.bench.pools import Shape
from kernels.bench.report import Row, append, show
from kernels.bench.timing import Work
from kernels.bench.variants import WrongKernel

COUNTS = (1, 16, 64)
_UPDATE = 512
_DTYPE = torch.bfloat16
# contexts, a pool's copy, steps' workspace
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


def _free(device: torch.device) -> int:
    """Bytes of the GPU that are free once all that nobody holds has been given back."""
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def _attention_rows(device: torch.device, rounds: int) -> Iterator[Row]:
    copy, _ = ceilings(device, 2**29, 16)
    yield from attention.rows(Shape(), attention.CASES, _DTYPE, device, copy, rounds)


def _sweep_rows(device: torch.device, rounds: int, seconds: float) -> Iterator[Row]:
    copy, _ = ceilings(device, 2**29, 16)
    yield from sweep.rows(Shape(), sweep.CASES, _DTYPE, device, copy, rounds, seconds)


def _model_rows(device: torch.device, rounds: int) -> Iterator[Row]:
    """The whole model's rows, with as many tenants as fit beside the weights."""
    config, dtype = eight_b(), _DTYPE
    _free(device)
    weights = model.random_weights(config, dtype, device)
    yield from residents.rows(config, dtype, device, _free(device))
    copy, matmul = ceilings(device, 2**29, 8192)
    # all that decode and the one that begins: none loses its place to another, as in a server
    sequences = max(COUNTS) + 1
    sizes = Sizes(max(_UPDATE, model.PROMPT), sequences, context=1 + Rows.rounded(model.ROOM))
    for rotating in (False, True):
        form = PoolForm(copies=not rotating)
        each = form.pool_bytes(config, dtype) + form.copy_bytes(config, dtype)
        tenants = min(max(COUNTS), (_free(device) - _RESERVE) // each - 1)
        make = partial(KernelOperations, sizes=sizes, rotating=rotating)
        bench = model.Bench.make(config, weights, tenants, make, cuda_capture())
        yield from model.decode_rows(bench, weights, COUNTS, copy, rounds)
        if not rotating:
            yield from model.other_rows(bench, _UPDATE, copy, matmul, rounds)
        # its pools must be gone before the other form's come
        del bench


def measure(halves: Iterable[tuple[str, Iterator[Row]]], csv: Path, device: str) -> int:
    """Prints and keeps each row as it comes, so that what fails later takes none along; returns the exit status.

    A wrong kernel ends it all; after anything else that goes wrong in one half the other is measured.
    """
    failed = False
    for half, rows in halves:
        try:
            for row in rows:
                append(csv, device, [row])
                print(show(row), flush=True)
                failed |= row.reached is False
        except WrongKernel as error:
            print(f"{error}: nothing more is timed", file=sys.stderr)
            return 1
        except Exception as error:
            # whatever a driver or a compiler may raise, most likely that the memory is full
            traceback.print_exc()
            print(f"{half}: the rest was not measured: {error}", file=sys.stderr, flush=True)
            failed = True
    return int(failed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--csv", type=Path, default=Path("bench.csv"))
    parser.add_argument(
        "--only",
        choices=("attention", "model", "sweep"),
        help="default: the first two; sweep compares tunings",
    )
    parser.add_argument(
        "--seconds", type=float, default=230, help="of the sweep, which then ends with what it has"
    )
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU is here: nothing was measured", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = torch.device("cuda")
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    halves = {
        "attention": lambda: _attention_rows(device, given.rounds),
        "model": lambda: _model_rows(device, given.rounds),
        "sweep": lambda: _sweep_rows(device, given.rounds, given.seconds),
    }
    chosen = [given.only] if given.only else ["attention", "model"]
    return measure(((half, halves[half]()) for half in chosen), given.csv, name)


if __name__ == "__main__":
    sys.exit(main())
