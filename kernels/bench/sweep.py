"""Attention compiled in many ways, side by side: which steps, warps, stages and programs are the fastest.

All are compiled beforehand, in processes of their own that fill Triton's cache. What spills is dropped, each is
compared with its twin before it is timed, and those of a case are timed in turns. When its time is over it ends with
what it has.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from time import monotonic

import torch

from kernels import compile as compiler
from kernels.bench.attention import COPIES, EIGHT_BIT, ROTATING, in_turn
from kernels.bench.pools import Data, Shape
from kernels.bench.report import Row
from kernels.bench.timing import Repeated, Work, captured, interleaved
from kernels.bench.variants import Stored, WrongKernel, check, of_kernel
from kernels.memory_attention import Tuning, decode_tile_rows, tuning

_FORMS = {COPIES: (False, False), ROTATING: (True, False), EIGHT_BIT: (True, True)}
# of the time that is left, for compiling
_COMPILING = 0.5
# programs that are tried of one kernel: as many as fit, and fewer
_FEWER = 3


@dataclass(frozen=True)
class Case:
    form: str
    tenants: int
    sequences: int

    @property
    def name(self) -> str:
        return f"{self.tenants} x {self.sequences}"


# what decides most comes first: time may be short
CASES = (
    Case(COPIES, 16, 1), Case(COPIES, 1, 1), Case(COPIES, 1, 16), Case(ROTATING, 16, 1), Case(EIGHT_BIT, 16, 1),
    Case(ROTATING, 1, 1), Case(ROTATING, 1, 16), Case(EIGHT_BIT, 1, 1),
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """One kernel to be compiled."""

    form: str
    sequences: int
    tuned: Tuning


Prepare = Callable[[Shape, torch.dtype, list[Asked], float], Mapping[Asked, compiler.Built]]


def usual(shape: Shape, dtype: torch.dtype, form: str, sequences: int) -> Tuning:
    """What the server compiles."""
    rotating, eight_bit = _FORMS[form]
    rows = decode_tile_rows(shape.group, sequences)
    return tuning(shape.head_dim, dtype, rows, rotated=not rotating, eight_bit=eight_bit)


def neighbours(base: Tuning) -> list[Tuning]:
    """``base`` and what lies around it; ``programs`` is left to what fits."""
    found = [base]
    for step in (base.step, base.step // 2, base.step * 2):
        for num_warps in (4, 8):
            for num_stages in (base.num_stages, base.num_stages + 1, 2, 5):
                for registers in (None, 168) if num_warps == 4 else (None,):
                    near = Tuning(step, num_warps, num_stages, base.programs, registers)
                    if 16 <= step <= 128 and near not in found:
                        found.append(near)
    return found


def compile_all(
    shape: Shape, dtype: torch.dtype, asked: list[Asked], seconds: float
) -> dict[Asked, compiler.Built]:
    """Compiles in as many processes as there are cores, for this GPU, until ``seconds`` are over."""
    major, minor = torch.cuda.get_device_capability()
    arch = 80 if major * 10 + minor < 90 else 90
    built: dict[Asked, compiler.Built] = {}
    # forked processes could not use the GPU
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=context)
    try:
        futures = {executor.submit(_compile, shape, dtype, each, arch): each for each in asked}
        done, late = wait(futures, timeout=seconds)
        for future in done:
            error = future.exception()
            if error is None:
                built[futures[future]] = future.result()
            else:
                print(f"{futures[future]}: {error}", file=sys.stderr, flush=True)
        if late:
            print(
                f"{len(late)} of {len(asked)} kernels were not compiled in time", file=sys.stderr, flush=True
            )
    finally:
        executor.shutdown(cancel_futures=True)
    return built


@cache
def _small(shape: Shape, dtype: torch.dtype, sequences: int) -> Data:
    """One pool, but of the same size: that is part of what a kernel is compiled for."""
    return Data.random(replace(shape, pools=1), 1, sequences, dtype, torch.device("cuda"))


def _compile(shape: Shape, dtype: torch.dtype, asked: Asked, arch: int) -> compiler.Built:
    """In a process of its own. What does not spill is launched once, so that the cache has what a launch asks for."""
    rotating, eight_bit = _FORMS[asked.form]
    sizes = (shape.kv_heads, shape.group, shape.head_dim, shape.slots, 0)
    rows = decode_tile_rows(shape.group, asked.sequences)
    job = compiler.partial_job(
        asked.form,
        compiler.Shape("", dtype, *sizes),
        rows,
        asked.tuned,
        rotating=rotating,
        eight_bit=eight_bit,
    )
    with tempfile.TemporaryDirectory() as folder:
        built = compiler.build(job, arch, Path(folder))
    if not built.spills and built.programs:
        data = _small(shape, dtype, asked.sequences)
        variant = of_kernel(data, asked.sequences, rotating=rotating, eight_bit=eight_bit, tuned=asked.tuned)
        variant.attend(0)
        torch.cuda.synchronize()
    return built


def rows(
    shape: Shape,
    cases: tuple[Case, ...],
    dtype: torch.dtype,
    device: torch.device,
    copy: tuple[Work, int],
    rounds: int,
    seconds: float,
    *,
    prepare: Prepare = compile_all,
    near: Callable[[Tuning], list[Tuning]] = neighbours,
) -> Iterator[Row]:
    """The figures of each case, the best first. Raises WrongKernel at the end if one was wrong."""
    end = monotonic() + seconds
    kinds = dict.fromkeys((case.form, _tile(shape, case)) for case in cases)
    lists = [
        [Asked(form, width, tuned) for tuned in near(usual(shape, dtype, form, width))]
        for form, width in kinds
    ]
    # the usual ones first, then the neighbours of all in turn
    asked = [each for turn in zip_longest(*lists) for each in turn if each is not None]
    built = prepare(shape, dtype, asked, seconds * _COMPILING)
    wrong: list[str] = []
    for index, case in enumerate(cases):
        left = end - monotonic()
        if left <= 0:
            print(f"time is over before {case.name}, {case.form}", file=sys.stderr, flush=True)
            break
        until = end - left + left / (len(cases) - index)
        mine = {
            a.tuned: b for a, b in built.items() if (a.form, a.sequences) == (case.form, _tile(shape, case))
        }
        yield from _case(shape, case, mine, dtype, device, copy, rounds, until, wrong)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if wrong:
        raise WrongKernel("; ".join(wrong))


def _tile(shape: Shape, case: Case) -> int:
    """Sequences that fill a tile of the size that the case's take: those with equal ones share their kernels."""
    return max(1, decode_tile_rows(shape.group, case.sequences) // shape.group)


def timed(built: Mapping[Tuning, compiler.Built]) -> list[Tuning]:
    """Of each kernel that does not spill, as many programs as fit, and fewer."""
    found: dict[Tuning, None] = {}
    for tuned, resources in built.items():
        if resources.spills:
            continue
        most = resources.programs
        for programs in range(most, max(0, most - _FEWER), -1):
            found[replace(tuned, programs=programs)] = None
    return list(found)


def _case(
    shape: Shape,
    case: Case,
    built: Mapping[Tuning, compiler.Built],
    dtype: torch.dtype,
    device: torch.device,
    copy: tuple[Work, int],
    rounds: int,
    until: float,
    wrong: list[str],
) -> Iterator[Row]:
    rotating, eight_bit = _FORMS[case.form]
    data = Data.random(shape, case.tenants, case.sequences, dtype, device)
    stored = Stored.of(data, rotating=rotating, eight_bit=eight_bit)
    work: dict[str, Work | Repeated] = {"copy": captured(copy[0], device)}
    notes: dict[str, str] = {}
    element = 0.0
    base = usual(shape, dtype, case.form, case.sequences)
    for tuned in sorted(timed(built), key=lambda t: t != base):
        if work.keys() - {"copy"} and monotonic() > until:
            print(f"{case.name}, {case.form}: not all were timed", file=sys.stderr, flush=True)
            break
        name = values(tuned)
        try:
            variant = of_kernel(
                data, case.sequences, rotating=rotating, eight_bit=eight_bit, stored=stored, tuned=tuned
            )
            check(f"{case.name}, {case.form}, {name}", data, variant)
        except WrongKernel as error:
            # the others are still worth knowing
            print(error, file=sys.stderr, flush=True)
            wrong.append(str(error))
            continue
        element = variant.bytes_per_element
        work[name] = in_turn(variant, data.layers, device)
        kept = next(b for t, b in built.items() if replace(t, programs=tuned.programs) == tuned)
        usual_mark = "; as the server has it" if tuned == base else ""
        notes[name] = f"{name}; {kept.registers} registers, {kept.shared} bytes shared{usual_mark}"
    times = interleaved(work, device, rounds)
    bandwidth = copy[1] / times.pop("copy")
    elements = 2 * data.layers * case.tenants * shape.pool * shape.kv_heads * shape.head_dim
    for name in sorted(times, key=times.__getitem__):
        share = elements * element / times[name] / bandwidth
        note = f"{times[name] / data.layers * 1e6:.1f} us a layer; {notes[name]}"
        yield Row(f"sweep, {case.form}: of the copy bandwidth", case.name, share, "", note=note)


def values(tuned: Tuning) -> str:
    """For people, and for a column of a CSV."""
    most = "" if tuned.registers is None else f" of at most {tuned.registers} registers"
    return f"step {tuned.step}, {tuned.num_warps} warps, {tuned.num_stages} stages, {tuned.programs} programs{most}"
