"""Attention over pools: hot copies, in-kernel rotation and 8 bits, beside torch's attention and the copy bandwidth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.bench.pools import Data, Shape
from kernels.bench.report import Row
from kernels.bench.timing import Repeated, Work, captured, interleaved
from kernels.bench.variants import Variant, check, of_kernel, of_sdpa

COPIES, ROTATING, EIGHT_BIT, SDPA = "hot copy", "in-kernel rotation", "8 bits", "sdpa, pool alone"
_ALONE = "hot copy, one sequence"


@dataclass(frozen=True)
class Case:
    tenants: int
    sequences: int

    @property
    def name(self) -> str:
        return f"{self.tenants} x {self.sequences}"


CASES = (Case(1, 1), Case(1, 16), Case(4, 1), Case(16, 1), Case(32, 1))


def rows(
    shape: Shape,
    cases: tuple[Case, ...],
    dtype: torch.dtype,
    device: torch.device,
    copy: tuple[Work, int],
    rounds: int,
) -> Iterator[Row]:
    """Times all variants. ``copy`` is work that moves so many bytes, the bandwidth's measure. Raises WrongKernel."""
    for case in cases:
        yield from _rows(shape, case, dtype, device, copy, rounds)
        # the next case's pools are drawn in the room of these
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _rows(
    shape: Shape,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    copy: tuple[Work, int],
    rounds: int,
) -> Iterator[Row]:
    data = Data.random(shape, case.tenants, case.sequences, dtype, device)
    variants = {
        COPIES: of_kernel(data, case.sequences, rotating=False),
        ROTATING: of_kernel(data, case.sequences, rotating=True),
        EIGHT_BIT: of_kernel(data, case.sequences, rotating=True, eight_bit=True),
        SDPA: of_sdpa(data, case.sequences),
    }
    for name, variant in variants.items():
        check(f"{case.name}, {name}", data, variant)
    work = {name: in_turn(variant, data.layers, device) for name, variant in variants.items()}
    work["copy"] = captured(copy[0], device)
    sharing = case.tenants == 1 and case.sequences > 1
    if sharing:
        # beside the others in the same turns: clocks drift
        one = data.first_sequence()
        alone = of_kernel(one, 1, rotating=False)
        check(f"{case.name}, {_ALONE}", one, alone)
        work[_ALONE] = in_turn(alone, data.layers, device)
    times = interleaved(work, device, rounds)
    bandwidth = copy[1] / times["copy"]
    elements = 2 * data.layers * case.tenants * shape.pool * shape.kv_heads * shape.head_dim
    for name, variant in variants.items():
        share = elements * variant.bytes_per_element / times[name] / bandwidth
        least = aim = None
        if name == COPIES and case.sequences == 1 and (case.tenants == 1 or case.tenants >= 4):
            least, aim = (0.5, 0.7) if case.tenants == 1 else (0.75, 0.92)
        note = f"{times[name] / data.layers * 1e6:.1f} us a layer"
        yield Row(f"attention, {name}: of the copy bandwidth", case.name, share, "", least, aim, note=note)
    faster = times[SDPA] / times[COPIES]
    yield Row("attention, hot copy: times as fast as sdpa", case.name, faster, "x", 1.5, 4)
    if sharing:
        more = times[COPIES] / times[_ALONE]
        yield Row("attention: time against one sequence", case.name, more, "x", 1.25, 1.1, less=True)


def in_turn(variant: Variant, layers: int, device: torch.device) -> Repeated:
    """All layers in turn."""

    def attend() -> None:
        for layer in range(layers):
            variant.attend(layer)

    return captured(attend, device)
