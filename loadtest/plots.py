"""A scenario's plots: what the client saw and what the server said of itself, as SVG."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from experiments.plot import Curve, line_chart
from loadtest.client import Answer
from loadtest.figures import fairness, quantile
from loadtest.measures import USEFUL_SECONDS
from loadtest.run import Result
from loadtest.scrape import Sample, by_label, total

MOST_POINTS = 300
MOST_CURVES = 8
_SHARES = [n / 100 for n in range(100)] + [0.995, 0.999]


def plots(result: Result) -> list[str]:
    """SVG documents; those for which there is nothing to draw are left out. What is over time is over the same time in
    all of them, with a mark where a phase begins."""
    drawn = [plot(result) for plot in (_first_tokens, _per_token, _goodput)]
    if len(result.samples) > 2:
        drawn += [plot(result) for plot in (_queueing, _residency, _memory, _processor)]
    drawn.append(_fairness(result))
    return [chart for chart in drawn if chart]


def span(result: Result) -> tuple[float, float]:
    """Monotonic seconds between which anything was measured; that of which plots' seconds are counted, first."""
    times = [s.time for s in result.samples] + [t for a in result.answers for t in (a.due, a.end) if t]
    return (min(times), max(times)) if times else (0.0, 0.0)


def _kept(curves: Iterable[Curve]) -> list[Curve]:
    whole = [c for c in curves if len(c.points) > 1 and all(math.isfinite(p[1]) for p in c.points)]
    return whole[:MOST_CURVES]


def _over_time(
    result: Result,
    title: str,
    y: str,
    curves: Iterable[Curve],
    *,
    y_percent: bool = False,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Curves over seconds of the monotonic clock."""
    began, ended = span(result)
    moved = [replace(c, points=[(x - began, value) for x, value in c.points]) for c in _kept(curves)]
    if not moved:
        return ""
    return line_chart(
        title,
        "seconds",
        y,
        moved,
        x_range=(0, ended - began),
        y_range=y_range,
        y_percent=y_percent,
        marks=[phase.began - began for phase in result.phases],
    )


def _groups(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.kind == "generate" and answer.good:
            groups[answer.group].append(answer)
    return groups


def _quantiles(title: str, result: Result, value: Callable[[Answer], float]) -> str:
    curves = []
    for group, answers in _groups(result.answers).items():
        values = sorted(1e3 * v for v in map(value, answers) if v > 0)
        if len(values) > 1:
            points = [(100 * share, quantile(values, share)) for share in _SHARES]
            curves.append(Curve(f"{group or 'all'} ({len(values):,})", points))
    kept = _kept(curves)
    if not kept:
        return ""
    label = "ms (logarithmic)"
    return line_chart(title, "per cent of requests", label, kept, x_range=(0, 100), y_log=True)


def _first_tokens(result: Result) -> str:
    return _quantiles("Time to first token, from when the request was due", result, lambda a: a.first - a.due)


def _per_token(result: Result) -> str:
    return _quantiles("Time per token", result, lambda a: a.per_token)


def _binned(
    began: float, ended: float, amounts: Iterable[tuple[float, float, float]]
) -> list[tuple[float, float]]:
    """``amounts`` (from, to, how much), spread evenly over their times, as sums a second in bins of at least one."""
    width = max(1.0, (ended - began) / MOST_POINTS)
    bins = [0.0] * max(1, math.ceil((ended - began) / width))
    for start, stop, amount in amounts:
        first, last = (min(max(0, int((t - began) / width)), len(bins) - 1) for t in (start, stop))
        for number in range(first, last + 1):
            left, right = began + number * width, began + (number + 1) * width
            inside = min(right, stop) - max(left, start)
            bins[number] += amount * inside / (stop - start) if first < last else amount
    return [(began + (number + 0.5) * width, amount / width) for number, amount in enumerate(bins)]


def _goodput(result: Result) -> str:
    """What was asked for when it was due; what came of it, spread over the time in which it came."""
    reads = [a for a in result.answers if a.kind == "generate"]
    began, ended = span(result)

    def came(answers: Iterable[Answer]) -> list[tuple[float, float]]:
        return _binned(
            began,
            ended,
            ((a.first, a.last, a.tokens) if a.streamed else (a.end, a.end, a.tokens) for a in answers),
        )

    def asked(answers: Iterable[Answer], when: Callable[[Answer], float]) -> list[tuple[float, float]]:
        return _binned(began, ended, ((when(a), when(a), a.asked) for a in answers))

    good = [a for a in reads if a.good]
    late = [a for a in good if a.first - a.due > USEFUL_SECONDS]
    refused = [a for a in reads if a.status >= 400]
    curves = [
        Curve("asked for", asked(reads, lambda a: a.due), dashed=True),
        Curve("came in time", came(a for a in good if a.first - a.due <= USEFUL_SECONDS)),
    ]
    if late:
        curves.append(Curve("came too late", came(late)))
    if refused:
        curves.append(Curve("refused", asked(refused, lambda a: a.end)))
    return _over_time(result, "Goodput", "tokens/s", curves) if reads else ""


def _thin(samples: Sequence[Sample]) -> list[Sample]:
    return list(samples[:: max(1, len(samples) // MOST_POINTS)])


def _queueing(result: Result) -> str:
    samples = _thin(result.samples)
    curves = [
        Curve(name, [(s.time, total(s.metrics, f"num_requests_{name}")) for s in samples])
        for name in ("running", "waiting")
    ]
    return _over_time(result, "Queueing, as the server says", "requests", curves)


def _residency(result: Result) -> str:
    samples = _thin(result.samples)
    tiers = sorted(by_label(samples[-1].metrics, "memories"))
    curves = [
        Curve(tier, [(s.time, total(s.metrics, "memories", tier=tier)) for s in samples])
        for tier in tiers
        if tier != "cold"
    ]
    loads = [(s.time, total(s.metrics, "memory_loads_total")) for s in samples]
    rates = [
        (later[0], (later[1] - earlier[1]) / (later[0] - earlier[0]))
        for earlier, later in itertools.pairwise(loads)
    ]
    curves.append(Curve("loads a second", rates, dashed=True))
    return _over_time(result, "Residency, as the server says", "memories", curves)


def _memory(result: Result) -> str:
    samples = _thin(result.samples)
    curves = [
        Curve(name, [(s.time, s.resident[number] / 1e6) for s in samples])
        for number, name in enumerate(("API", "worker"))
    ]
    return _over_time(result, "Resident set of the processes", "MB", curves)


def _processor(result: Result) -> str:
    samples = _thin(result.samples)
    curves = []
    for number, name in enumerate(("API", "worker")):
        points = [
            (later.time, (later.cpu[number] - earlier.cpu[number]) / (later.time - earlier.time))
            for earlier, later in itertools.pairwise(samples)
        ]
        curves.append(Curve(name, points))
    return _over_time(result, "Processor time", "of a core", curves, y_percent=True)


def _fairness(result: Result) -> str:
    """Jain's index over what each tenant got of its max-min fair share. In stretches in which a tenant can have some
    four answers: where there is one for every third, even the fairest leaves the others with nothing."""
    reads = [a for a in result.answers if a.kind == "generate" and a.asked and not a.hung_up]
    good = sum(a.good for a in reads)
    tenants = len({a.tenant for a in reads})
    if tenants < 2 or not good:
        return ""
    first = min(a.due for a in reads)
    seconds = max(a.due for a in reads) - first
    width = max(min(2.0, seconds / 3), seconds / 60, min(4 * tenants * seconds / good, seconds / 3))
    if not width:
        return ""
    last = math.ceil(seconds / width) - 1
    asked: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    got: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for answer in reads:
        stretch = min(int((answer.due - first) / width), last)
        asked[stretch][answer.tenant] += answer.asked
        if answer.good:
            got[stretch][answer.tenant] += answer.tokens
    points = [
        (first + (stretch + 0.5) * width, fairness(asked[stretch], got[stretch]))
        for stretch in sorted(asked)
        if sum(got[stretch].values())
    ]
    title = f"Fairness between tenants (Jain), in stretches of {width:.3g} s"
    curve = Curve("of fair shares", points)
    return _over_time(result, title, "index (1: all alike)", [curve], y_range=(0, 1))
