"""A scenario's plots: what the client saw and what the server said of itself, as SVG."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from experiments.plot import Curve, line_chart
from loadtest.client import Answer
from loadtest.figures import fairness, quantile
from loadtest.run import Result
from loadtest.scrape import Sample, by_label, series, total

MOST_POINTS = 300
MOST_CURVES = 8
_SHARES = [n / 100 for n in range(100)] + [0.995, 0.999]


def plots(result: Result) -> list[str]:
    """SVG documents; those for which there is nothing to draw are left out."""
    drawn = [plot(result) for plot in (_first_tokens, _per_token, _goodput)]
    if len(result.samples) > 2:
        drawn += [plot(result) for plot in (_queueing, _residency, _memory, _processor)]
    drawn.append(_fairness(result))
    return [chart for chart in drawn if chart]


def _chart(title: str, x: str, y: str, curves: Iterable[Curve], *, y_percent: bool = False) -> str:
    kept = [c for c in curves if len(c.points) > 1 and all(math.isfinite(p[1]) for p in c.points)][
        :MOST_CURVES
    ]
    return line_chart(title, x, y, kept, y_percent=y_percent) if kept else ""


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
    return _chart(title, "per cent of requests", "ms", curves)


def _first_tokens(result: Result) -> str:
    return _quantiles("Time to first token, from when the request was due", result, lambda a: a.first - a.due)


def _per_token(result: Result) -> str:
    return _quantiles("Time per token", result, lambda a: a.per_token)


def _binned(
    answers: Iterable[Answer],
    began: float,
    ended: float,
    when: Callable[[Answer], float],
    value: Callable[[Answer], float],
) -> list[tuple[float, float]]:
    """Sums a second in bins of at least a second."""
    width = max(1.0, (ended - began) / MOST_POINTS)
    bins = [0.0] * (int((ended - began) / width) + 1)
    for answer in answers:
        at = int((when(answer) - began) / width)
        if 0 <= at < len(bins):
            bins[at] += value(answer)
    return [((number + 0.5) * width, amount / width) for number, amount in enumerate(bins[:-1])]


def _span(answers: Sequence[Answer]) -> tuple[float, float]:
    return min(a.due for a in answers), max(a.end for a in answers)


def _goodput(result: Result) -> str:
    reads = [a for a in result.answers if a.kind == "generate"]
    if not reads:
        return ""
    began, ended = _span(reads)
    good = [a for a in reads if a.good]
    refused = [a for a in reads if a.status >= 400]
    curves = [
        Curve("asked", _binned(reads, began, ended, lambda a: a.due, lambda a: a.asked), dashed=True),
        Curve("answered", _binned(good, began, ended, lambda a: a.end, lambda a: a.tokens)),
    ]
    if refused:
        curves.append(Curve("refused", _binned(refused, began, ended, lambda a: a.end, lambda a: a.asked)))
    return _chart("Goodput", "seconds", "tokens/s", curves)


def _thin(samples: Sequence[Sample]) -> list[Sample]:
    return list(samples[:: max(1, len(samples) // MOST_POINTS)])


def _queueing(result: Result) -> str:
    samples = _thin(result.samples)
    curves = [
        Curve(name, series(samples, lambda s, n=name: total(s.metrics, f"num_requests_{n}")))  # type: ignore[misc]
        for name in ("running", "waiting")
    ]
    return _chart("Queueing, as the server says", "seconds", "requests", curves)


def _residency(result: Result) -> str:
    samples = _thin(result.samples)
    tiers = sorted(by_label(samples[-1].metrics, "memories"))
    curves = [
        Curve(tier, series(samples, lambda s, t=tier: total(s.metrics, "memories", tier=t)))  # type: ignore[misc]
        for tier in tiers
        if tier != "cold"
    ]
    loads = [(s.time, total(s.metrics, "memory_loads_total")) for s in samples]
    rates = [
        (later[0] - samples[0].time, (later[1] - earlier[1]) / (later[0] - earlier[0]))
        for earlier, later in itertools.pairwise(loads)
    ]
    return _chart(
        "Residency, as the server says",
        "seconds",
        "memories",
        [*curves, Curve("loads a second", rates, dashed=True)],
    )


def _memory(result: Result) -> str:
    samples = _thin(result.samples)
    curves = [
        Curve(name, series(samples, lambda s, n=number: s.resident[n] / 1e6))  # type: ignore[misc]
        for number, name in enumerate(("API", "worker"))
    ]
    return _chart("Resident set of the processes", "seconds", "MB", curves)


def _processor(result: Result) -> str:
    samples = _thin(result.samples)
    curves = []
    for number, name in enumerate(("API", "worker")):
        points = [
            (
                later.time - samples[0].time,
                (later.cpu[number] - earlier.cpu[number]) / (later.time - earlier.time),
            )
            for earlier, later in itertools.pairwise(samples)
        ]
        curves.append(Curve(name, points))
    return _chart("Processor time", "seconds", "of a core", curves, y_percent=True)


def _fairness(result: Result) -> str:
    """Jain's index over what each tenant got of its max-min fair share, in stretches of two seconds or more."""
    reads = [a for a in result.answers if a.kind == "generate" and a.asked and not a.hung_up]
    if len({a.tenant for a in reads}) < 2:
        return ""
    began, ended = _span(reads)
    width = max(2.0, (ended - began) / 60)
    asked: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    got: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for answer in reads:
        stretch = int((answer.due - began) / width)
        asked[stretch][answer.tenant] += answer.asked
        if answer.good:
            got[stretch][answer.tenant] += answer.tokens
    points = [
        ((stretch + 0.5) * width, fairness(asked[stretch], got[stretch]))
        for stretch in sorted(asked)
        if sum(got[stretch].values())
    ]
    return _chart("Fairness between tenants (Jain)", "seconds", "index", [Curve("of fair shares", points)])
