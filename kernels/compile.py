"""Compiles every kernel ahead of time to machine code, without a GPU: ``python -m kernels.compile``.

Prints registers, shared memory, spills and how many programs fit a multiprocessor, beside how many are launched for
one, for sm_80 and sm_90. Fails if a kernel spills, if fewer fit, or if it does not compile.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import add_norm, hot_copy, rotate_rows, swiglu
from kernels import memory_attention as attention
from kernels import write_block as writing
from kernels.attention_kernels import merge_kernel, partial_kernel
from kernels.plan import PlanShape
from kernels.support import ROTATED_HEAD_DIMS

# bytes of shared memory that one block may ask for
SHARED = {80: 163 * 1024, 90: 227 * 1024}
# of a multiprocessor
_REGISTERS, _WARPS, _BLOCKS = 65_536, 64, 32
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Shape:
    """A model whose kernels are compiled."""

    name: str
    dtype: torch.dtype
    kv_heads: int
    group: int
    head_dim: int
    pool_slots: int
    hidden_size: int


SHAPES = {
    "8b": Shape("8b", torch.bfloat16, 8, 4, 128, 13_056, 4096),
    "7b": Shape("7b", torch.bfloat16, 32, 1, 128, 7936, 4096),
    "wide": Shape("wide", torch.bfloat16, 4, 2, 256, 3328, 2048),
    "pocket": Shape("pocket", torch.bfloat16, 3, 1, 64, 816, 192),
    "pocket-fp32": Shape("pocket-fp32", torch.float32, 3, 1, 64, 816, 192),
}


@dataclass(frozen=True)
class Job:
    """One specialisation: a kernel, its arguments' Triton types by name, and its compile-time values."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int
    programs: int = 1
    registers: int | None = None


@dataclass(frozen=True)
class Built:
    """What the machine code says: registers a thread, bytes of shared memory a block, bytes spilled a thread; and how
    many such blocks a multiprocessor holds at once."""

    name: str
    arch: int
    registers: int
    shared: int
    spills: int
    programs: int


def programs(arch: int, num_warps: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor of sm_``arch`` holds at once; 0 if not even one.

    From NVIDIA's "CUDA C++ Programming Guide", its table of technical specifications by compute capability, and the
    header ``cuda_occupancy.h``: 65,536 registers, given to warps in units of 256, a warp being of 32 threads; to the
    four schedulers' own quarters, so that warps are rounded down to a multiple of four; 64 warps and 32 blocks;
    164 or 228 KB of shared memory, of which each block takes 1 KB more than it asks for, in units of 128 bytes.
    """
    a_warp = -(-registers * 32 // 256) * 256
    warps = min(_WARPS, _REGISTERS // a_warp // 4 * 4)
    a_block = -(-(shared + 1024) // 128) * 128
    return min(_BLOCKS, warps // num_warps, (SHARED[arch] + 1024) // a_block)


def partial_job(
    label: str,
    shape: Shape,
    tile_rows: int,
    tuned: attention.Tuning,
    *,
    rotating: bool = False,
    eight_bit: bool = False,
) -> Job:
    """The partial kernel of memory attention, compiled as ``tuned`` says."""
    kind = "*" + _TYPES[shape.dtype]
    types = dict.fromkeys(("query", "key", "value", "cache_key", "cache_value", "cos", "sin"), kind)
    types |= dict.fromkeys(("workers", "segments", "members", "rows", "table"), "*i32")
    types |= {"key_scale": "*fp32", "value_scale": "*fp32", "scale": "fp32"}
    if eight_bit:
        types |= {"key": "*i8", "value": "*i8"}
    types |= {"visibility": "*i32" if rotating else kind, "first_position": "i32", "table_width": "i32"}
    types |= {"partial": "*fp32", "normaliser": "*fp32"}
    constants = attention.partial_constants(
        PlanShape(64, 33, tile_rows, shape.group, tuned.step),
        shape.pool_slots,
        shape.kv_heads,
        shape.head_dim,
        tuned,
        rotating=rotating,
        eight_bit=eight_bit,
    )
    tuned_to = (tuned.num_warps, tuned.num_stages, tuned.programs, tuned.registers)
    return Job(label, partial_kernel, types, constants, *tuned_to)


def attention_jobs(shape: Shape) -> Iterator[Job]:
    prompt, turned = (
        attention.prompt_tile_rows(shape.group, shape.head_dim, shape.dtype, rotated=rotated)
        for rotated in (True, False)
    )
    for label, tile_rows, rotating, eight_bit in (
        ("decode", 16, False, False),
        ("decode, 64 rows", 64, False, False),
        ("decode, 32 rows", 32, False, False),
        ("decode, rotating", 16, True, False),
        ("decode, 32 rows, rotating", 32, True, False),
        ("decode, 64 rows, rotating", 64, True, False),
        ("decode, 8 bits", 16, True, True),
        ("decode, 32 rows, 8 bits", 32, True, True),
        ("decode, 64 rows, 8 bits", 64, True, True),
        ("prompts", prompt, False, False),
        ("prompts, rotating", turned, True, False),
        ("prompts, 8 bits", turned, True, True),
    ):
        if rotating and shape.head_dim not in ROTATED_HEAD_DIMS:
            continue
        tuned = attention.tuning(
            shape.head_dim, shape.dtype, tile_rows, rotated=not rotating, eight_bit=eight_bit
        )
        yield partial_job(label, shape, tile_rows, tuned, rotating=rotating, eight_bit=eight_bit)
        if not rotating:
            types = {
                "partial": "*fp32",
                "normaliser": "*fp32",
                "rows": "*i32",
                "out": "*" + _TYPES[shape.dtype],
            }
            plan = PlanShape(64, 33, tile_rows, shape.group, tuned.step)
            constants = attention.merge_constants(plan, shape.kv_heads, shape.head_dim)
            yield Job(f"{label}: merge", merge_kernel, types, constants, 4, 3)


def row_jobs(shape: Shape) -> Iterator[Job]:
    """What stands between a layer's products."""
    kind = "*" + _TYPES[shape.dtype]
    names = ("x", "delta", "weight", "total", "normed", "gate_up", "out", "qkv", "cos", "sin", "query")
    types = dict.fromkeys((*names, "cache_key", "cache_value"), kind)
    types |= {"eps": "fp32", "write_rows": "*i64"}
    types |= dict.fromkeys(("count", "rows", "reads", "cache_rows"), "i32")
    width = shape.hidden_size
    for label, adding in (("norm", False), ("sum and norm", True)):
        fixed = add_norm.constants(width, adding=adding)
        yield Job(label, add_norm.add_norm_kernel, types, fixed, add_norm.warps(width), 3)
    # the published models' feed-forward layers are 3.5 times as wide
    yield Job("swiglu", swiglu.swiglu_kernel, types, swiglu.constants(7 * width // 2), 4, 3)
    turned = rotate_rows.constants(shape.kv_heads * shape.group, shape.kv_heads, shape.head_dim)
    yield Job("rotate rows", rotate_rows.rotate_rows_kernel, types, turned, 4, 3)


def jobs(shape: Shape) -> Iterator[Job]:
    yield from attention_jobs(shape)
    yield from row_jobs(shape)
    kind = "*" + _TYPES[shape.dtype]
    types = dict.fromkeys(("key", "out", "cos", "sin"), kind) | {"rank": "*i32", "first_position": "i32"}
    types |= {"key_stride": "i64", "out_stride": "i64"}
    turned = hot_copy.constants(shape.pool_slots, shape.kv_heads, shape.head_dim)
    yield Job("hot copy", hot_copy.hot_copy_kernel, types, turned, 4, 3)
    types = dict.fromkeys(("hidden", "norm", "weight", "bias", "key", "value"), kind)
    types |= {"slots": "*i32", "tokens": "i32", "eps": "fp32"}
    constants = writing.constants(
        shape.hidden_size, shape.pool_slots, shape.kv_heads, shape.head_dim, biased=False
    )
    yield Job("write block", writing.write_block_kernel, types, constants, 4, 3)


def build(job: Job, arch: int, folder: Path) -> Built:
    """Compiles ``job`` for sm_``arch`` and reads from the machine code what it takes."""
    names = job.kernel.arg_names
    signature = {name: "constexpr" if name in job.constants else job.types[name] for name in names}
    # buffers of torch begin at multiples of 16 bytes, which the launcher would find as well where it looks
    unseen = job.kernel.do_not_specialize_on_alignment or ()
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind[0] == "*" and name not in unseen
    }
    constants = {(names.index(name),): value for name, value in job.constants.items()}
    source = ASTSource(job.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages, "maxnreg": job.registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    report = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    # what a thread keeps in local memory are registers that were spilled: no kernel here has arrays of its own
    spills = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", report))
    registers = re.search(r"REG:(\d+)", report)
    if registers is None:
        raise RuntimeError(f"{job.name}: the report is not understood: {report}")
    shared = compiled.metadata.shared
    held = programs(arch, job.num_warps, int(registers[1]), shared)
    return Built(job.name, arch, int(registers[1]), shared, spills, held)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.compile", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="a model's shape; default: all")
    parser.add_argument("--arch", type=int, choices=SHARED, action="append", help="default: all")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    failed = 0
    print(f"triton {triton.__version__}")
    print(
        f"{'shape':12}{'sm':>4}  {'kernel':34}{'warps':>6}{'registers':>10}{'shared':>9}{'programs':>10}{'spills':>8}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in given.shape or SHAPES:
            for arch in given.arch or SHARED:
                for job in jobs(SHAPES[name]):
                    built = build(job, arch, Path(folder))
                    bad = built.spills > 0 or built.programs < job.programs
                    failed += bad
                    print(
                        f"{name:12}{arch:4}  {job.name:34}{job.num_warps:6}{built.registers:10}"
                        f"{built.shared:9}{f'{built.programs} of {job.programs}':>10}{built.spills:8}"
                        f"{'  FAILED' if bad else ''}",
                        flush=True,
                    )
    print(
        "no kernel spills, and all programs fit"
        if not failed
        else f"{failed} kernels spill, or fewer programs fit a multiprocessor than they are launched for"
    )
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
