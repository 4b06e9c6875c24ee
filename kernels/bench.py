"""Times memory attention on a GPU, 8B shape, random tensors: ``python -m kernels.bench``.

Every case is first compared with the float64 twin; one that is wrong is not timed. Variants are captured in
CUDA graphs that go through several layers, more than the cache holds, and are replayed in turn. Each time stands
beside the copy bandwidth measured in the same run. Rows are appended to a CSV.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kernels.hot_copy import write_hot_copy
from kernels.memory_attention import Rotation, Scratch, memory_attention, reference, tuning
from kernels.plan import Plan, PlanShape

KV_HEADS, GROUP, HEAD_DIM, POOL, BLOCK = 8, 4, 128, 12_800, 256
SLOTS = POOL + BLOCK
LAYERS = 4
CONTEXT = 64
# largest error of an output against float64; values are averages of unit normals
TOLERANCE = 1e-2
CASES = ((1, 1), (1, 16), (4, 1), (16, 1), (64, 1))


@dataclass(frozen=True)
class Data:
    """``LAYERS`` layers for ``tenants`` with ``sequences`` each."""

    query: Tensor
    key: Tensor
    hot_key: Tensor
    value: Tensor
    rank: Tensor
    bias: Tensor
    cos: Tensor
    sin: Tensor
    cache_key: Tensor
    cache_value: Tensor
    table: Tensor
    owner: list[int]

    @classmethod
    def random(cls, tenants: int, sequences: int) -> Data:
        rows = tenants * sequences

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, dtype=torch.bfloat16, device="cuda")

        shape = (LAYERS, tenants, KV_HEADS, SLOTS, HEAD_DIM)
        key, value = normal(*shape), normal(*shape)
        rank = torch.rand(LAYERS, tenants, SLOTS, device="cuda").argsort(dim=-1).int()
        rank[rank >= POOL] = -1
        inverse = 5e5 ** (-torch.arange(0, HEAD_DIM, 2, device="cuda") / HEAD_DIM) / 1.8125
        angles = torch.arange(SLOTS + 1, device="cuda")[:, None] * inverse
        cos = torch.cat([angles.cos()] * 2, -1).bfloat16()
        sin = torch.cat([-angles.sin(), angles.sin()], -1).bfloat16()
        hot_key = torch.empty_like(key)
        for tenant in range(tenants):
            ranks = rank[:, tenant].contiguous()
            write_hot_copy(key[:, tenant], ranks, cos, sin, 1, hot_key[:, tenant])
        bias = torch.zeros(rank.shape, dtype=torch.bfloat16, device="cuda")
        bias.masked_fill_(rank < 0, -torch.inf)
        cache = (LAYERS, rows * CONTEXT, KV_HEADS, HEAD_DIM)
        table = torch.arange(rows * CONTEXT, dtype=torch.int32, device="cuda").view(rows, CONTEXT)
        owner = [row // sequences for row in range(rows)]
        query = normal(LAYERS, rows, KV_HEADS * GROUP, HEAD_DIM)
        return cls(
            query, key, hot_key, value, rank, bias, cos, sin, normal(*cache), normal(*cache), table, owner
        )


def variants(data: Data, sequences: int) -> dict[str, tuple[Callable[[int], object], Tensor]]:
    """By name: what attends in one layer, and where its output of that layer is found."""
    rows = data.query.shape[1]
    tile_rows = max(16, triton.next_power_of_2(min(sequences * GROUP, 64)))
    workers = max(1, torch.cuda.get_device_properties(0).multi_processor_count * 2 // KV_HEADS)
    found: dict[str, tuple[Callable[[int], object], Tensor]] = {}

    def add(name: str, rotating: bool) -> None:
        step = tuning(HEAD_DIM, torch.bfloat16, tile_rows, rotated=not rotating).step
        shape = PlanShape(rows, workers, tile_rows, GROUP, step)
        host, plan = Plan.allocate(shape, "cpu", pinned=True), Plan.allocate(shape, "cuda")
        pools = (data.key.shape[1], data.key.shape[1])
        host.fill(
            data.owner,
            data.owner,
            list(range(rows)),
            [CONTEXT] * rows,
            pool_slots=SLOTS,
            pools=pools,
            tables=(rows, CONTEXT),
        )
        plan.copy_(host)
        torch.cuda.synchronize()
        scratch = Scratch.allocate(shape, KV_HEADS, HEAD_DIM, "cuda")
        out = torch.full_like(data.query[0], torch.nan)

        def attend(layer: int) -> None:
            memory_attention(
                data.query[layer],
                data.key[layer] if rotating else data.hot_key[layer],
                data.value[layer],
                None if rotating else data.bias[layer],
                data.cache_key[layer],
                data.cache_value[layer],
                data.table,
                plan,
                scratch,
                out,
                rotation=Rotation(data.rank[layer], data.cos, data.sin, 1) if rotating else None,
            )

        found[name] = attend, out

    add("hot copy", False)
    add("in-kernel rotation", True)
    out = torch.full_like(data.query[0], torch.nan)

    def gathered(layer: int) -> None:
        """What a server without kernels of its own runs: torch's attention, pool by pool."""
        query = data.query[layer].view(-1, sequences, KV_HEADS * GROUP, HEAD_DIM)
        for tenant, rotated in enumerate(data.hot_key[layer]):
            result = F.scaled_dot_product_attention(
                query[tenant].transpose(0, 1)[None],
                rotated[None],
                data.value[layer, tenant][None],
                attn_mask=data.bias[layer, tenant][None, None, None],
                enable_gqa=True,
            )
            out.view(-1, sequences, KV_HEADS * GROUP, HEAD_DIM)[tenant] = result[0].transpose(0, 1)

    found["sdpa, pool alone"] = gathered, out
    return found


def error(data: Data, out: Tensor, layer: int) -> float:
    """The largest difference from float64, over a few rows (the twin takes gigabytes a row)."""
    worst = 0.0
    for row in sorted({0, data.query.shape[1] // 2, data.query.shape[1] - 1}):
        owner = data.owner[row]
        pool = slice(owner, owner + 1)
        exact = reference(
            data.query[layer, row : row + 1].double(),
            data.hot_key[layer, pool].double(),
            data.value[layer, pool].double(),
            data.rank[layer, pool] >= 0,
            data.cache_key[layer].double(),
            data.cache_value[layer].double(),
            data.table[row : row + 1],
            [0],
            [0],
            [0],
            [CONTEXT],
        )
        difference = (out[row].double() - exact[0]).abs().max()
        worst = max(worst, float("inf") if difference.isnan() else float(difference))
    return worst


def captured(attend: Callable[[int], object]) -> torch.cuda.CUDAGraph:
    """All layers in one CUDA graph: launching from Python takes longer than the kernels."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for layer in range(LAYERS):
            attend(layer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(LAYERS):
            attend(layer)
    return graph


def milliseconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def interleaved(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median milliseconds of each, taken in turn so that a clock that drifts hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 3):
        for name, run in work.items():
            time = milliseconds(run)
            if turn >= 3:
                taken[name].append(time)
    return {name: median(times) for name, times in taken.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--csv", type=Path, default=Path("bench.csv"))
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU is here: nothing was measured", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}, torch {torch.__version__}, triton {triton.__version__}")
    big = torch.empty(2**29, dtype=torch.bfloat16, device="cuda")
    other = torch.empty_like(big)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    wrong, lines = 0, []
    for tenants, sequences in CASES:
        data = Data.random(tenants, sequences)
        work: dict[str, Callable[[], object]] = {"copy": lambda: other.copy_(big)}
        for name, (attend, out) in variants(data, sequences).items():
            if not name.startswith("sdpa"):
                attend(LAYERS - 1)
                off = error(data, out, LAYERS - 1)
                if off > TOLERANCE:
                    print(f"{tenants} x {sequences}, {name}: off by {off:.2g}, not timed")
                    wrong += 1
                    continue
            work[name] = captured(attend).replay
        times = interleaved(work, given.rounds)
        copy_rate = 2 * big.nbytes / times.pop("copy") / 1e9
        read = 2 * LAYERS * tenants * POOL * KV_HEADS * HEAD_DIM * data.key.itemsize
        for name, time in times.items():
            rate = read / time / 1e9
            line = [today, gpu, torch.__version__, triton.__version__, tenants, sequences, name]
            lines.append([*line, f"{time / LAYERS:.4f}", f"{rate:.3f}", f"{copy_rate:.3f}"])
            print(
                f"{tenants:3} tenants x {sequences:2}  {name:20}{time / LAYERS * 1000:9.1f} us a layer"
                f"{rate:7.2f} TB/s  {rate / copy_rate:6.1%} of copying"
            )
        del data, work
        torch.cuda.empty_cache()
    new = not given.csv.exists()
    with given.csv.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            names = "date gpu torch triton tenants sequences variant ms_per_layer tb_per_s copy_tb_per_s"
            writer.writerow(names.split())
        writer.writerows(lines)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
