"""Times on a device, taken in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from statistics import median

import torch

Work = Callable[[], object]
WARM_UPS = 3
_REPEATS = 8


@dataclass(frozen=True)
class Repeated:
    """A call that does the same work ``times`` over."""

    call: Work
    times: int = 1


def captured(work: Work, device: torch.device, times: int = _REPEATS) -> Repeated:
    """``work`` some ``times`` in one CUDA graph; as it is, and once, on a CPU.

    Launching from Python takes longer than a kernel, and launching a graph a good part of a short one's time.
    """
    if device.type != "cuda":
        return Repeated(work)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            work()
    return Repeated(graph.replay, times)


def seconds(work: Work, device: torch.device) -> float:
    """By the host's clock, from an idle device to an idle device: launching counts."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def device_seconds(work: Work, device: torch.device) -> float:
    """By the device's own clock: what is launched ahead costs nothing."""
    if device.type != "cuda":
        return seconds(work, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def interleaved(
    work: Mapping[str, Work | Repeated],
    device: torch.device,
    rounds: int,
    by_host: Collection[str] = (),
) -> dict[str, float]:
    """The median seconds that each takes once, by the device's clock or, of those named, by the host's."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    # a CPU has nothing to warm but its caches
    warm_ups = WARM_UPS if device.type == "cuda" else 1
    for turn in range(rounds + warm_ups):
        for name, each in work.items():
            repeated = each if isinstance(each, Repeated) else Repeated(each)
            clock = seconds if name in by_host else device_seconds
            took = clock(repeated.call, device) / repeated.times
            if turn >= warm_ups:
                taken[name].append(took)
    return {name: median(times) for name, times in taken.items()}
