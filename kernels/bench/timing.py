"""Times on a device, taken in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

Work = Callable[[], object]
_WARM_UPS = 3


def captured(work: Work, device: torch.device) -> Work:
    """``work`` as a CUDA graph, for launching from Python takes longer than a kernel; as it is on a CPU."""
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


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
    work: dict[str, Work],
    device: torch.device,
    rounds: int,
    clock: Callable[[Work, torch.device], float] = device_seconds,
) -> dict[str, float]:
    """The median seconds of each."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + _WARM_UPS):
        for name, run in work.items():
            took = clock(run, device)
            if turn >= _WARM_UPS:
                taken[name].append(took)
    return {name: median(times) for name, times in taken.items()}
