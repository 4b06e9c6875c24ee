"""Plots of a scenario's run: over one time in all of them, what came where it came, and whole whatever is missing."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree

import pytest

from loadtest.client import Answer
from loadtest.measures import USEFUL_SECONDS
from loadtest.plots import _binned, plots, span
from loadtest.run import Phase, Result
from loadtest.scrape import Sample, parse

SVG = "{http://www.w3.org/2000/svg}"
ANSWER = Answer(
    "generate", "t", "g", due=100.0, asked=40, sent=100.0, first=101.0, last=105.0, end=105.0, status=200, tokens=40,
    streamed=True,
)  # fmt: skip


def sample(time: float) -> Sample:
    names = (
        "num_requests_running",
        "num_requests_waiting",
        'memories{tier="resident"}',
        "memory_loads_total",
    )
    text = "\n".join(f"memoryllm_{name} {time}" for name in names).encode()
    return Sample(time, parse(text), (1_000_000, 2_000_000), (0.5 * time, 0.1 * time))


def texts(chart: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(chart).iter(f"{SVG}text")]


def titled(result: Result) -> dict[str, str]:
    return {texts(chart)[0].partition(",")[0]: chart for chart in plots(result)}


def run(**more: object) -> Result:
    answers = [
        dataclasses.replace(
            ANSWER, tenant=f"t{n % 3}", due=100.0 + n, first=100.5 + n, last=104.0 + n, end=104.0 + n
        )
        for n in range(40)
    ]
    samples = [sample(98.0 + n) for n in range(60)]
    phases = [Phase("calm", 100.0, 120.0), Phase("storm", 120.0, 140.0)]
    return dataclasses.replace(Result("r", answers=answers, samples=samples, phases=phases), **more)  # type: ignore[arg-type]


def test_every_plot_has_its_title_units_and_the_same_time() -> None:
    result = run()
    assert span(result) == (98.0, 157.0)
    charts = titled(result)
    units = {
        "Time to first token": "ms (logarithmic)",
        "Time per token": "ms (logarithmic)",
        "Goodput": "tokens/s",
        "Queueing": "requests",
        "Residency": "memories",
        "Resident set of the processes": "MB",
        "Processor time": "of a core",
        "Fairness between tenants (Jain)": "index (1: all alike)",
    }
    assert charts.keys() == units.keys()
    for title, unit in units.items():
        assert unit in texts(charts[title])
        marks = re.findall(r'<path d="M([\d.]+) [^"]*"[^>]*stroke-dasharray="2 3"', charts[title])
        if unit.startswith("ms"):
            assert {"0", "100", "per cent of requests"} <= set(texts(charts[title]))
        else:
            # a phase that began 22 seconds after everything is at one place in all of them
            assert {"0", "50", "seconds"} <= set(texts(charts[title]))
            assert marks == ["92.7", "260.2"]


def test_tokens_are_where_they_came_and_none_is_lost() -> None:
    (first, *rest) = _binned(100.0, 110.0, [(101.5, 104.5, 30.0)])
    assert first == (100.5, 0.0)
    assert [round(amount, 6) for _, amount in rest] == [5, 10, 10, 5, 0, 0, 0, 0, 0]
    # what came at once, and at the very end
    assert _binned(100.0, 103.0, [(103.0, 103.0, 7.0)])[-1] == (102.5, 7.0)


def test_what_came_too_late_is_not_goodput(monkeypatch: pytest.MonkeyPatch) -> None:
    late = dataclasses.replace(ANSWER, first=ANSWER.due + USEFUL_SECONDS + 1, last=120.0, end=120.0)
    refused = dataclasses.replace(ANSWER, status=503, tokens=0, first=0.0, last=0.0, end=100.1)
    told = texts(titled(run(answers=[ANSWER, late, refused]))["Goodput"])
    assert {"asked for", "came in time", "came too late", "refused"} <= set(told)
    assert not {"came too late", "refused"} & set(texts(titled(run())["Goodput"]))
    drawn: dict[str, float] = {}

    def note(title: str, *labels: str, **options: object) -> str:
        drawn.update(
            {curve.name: sum(y for _, y in curve.points) for curve in labels[2] if title == "Goodput"}
        )  # type: ignore[attr-defined]
        return ""

    monkeypatch.setattr("loadtest.plots.line_chart", note)
    plots(run(answers=[ANSWER, late, late, refused]))
    assert drawn == pytest.approx({"asked for": 160, "came in time": 40, "came too late": 80, "refused": 40})


def test_fairness_is_told_of_stretches_in_which_it_can_be_seen() -> None:
    """Thirty tenants, one answer each in turn: in two seconds most have nothing, and nobody is treated worse."""
    answers = [
        dataclasses.replace(ANSWER, tenant=f"t{n % 30}", due=98.0 + n / 4, first=99.0, end=99.0)
        for n in range(236)
    ]
    refused = [dataclasses.replace(a, status=503, tokens=0) for a in answers]
    chart = titled(run(answers=answers + refused))["Fairness between tenants (Jain)"]
    assert "stretches of 19.6 s" in chart
    # the shortest run has them as well
    brief = [dataclasses.replace(ANSWER, tenant=f"t{n % 3}", due=100.0 + n / 40) for n in range(40)]
    assert "stretches of 0.325 s" in titled(run(answers=brief))["Fairness between tenants (Jain)"]
    assert re.findall(r'cy="([\d.]+)"', chart)
    assert all(float(y) < 60 for y in re.findall(r'cy="([\d.]+)"', chart))


@pytest.mark.parametrize(
    "missing",
    [
        {"answers": []},
        {"samples": []},
        {"answers": [], "samples": []},
        {"answers": [dataclasses.replace(ANSWER, status=503, tokens=0, first=0.0, last=0.0)]},
        {
            "answers": [dataclasses.replace(ANSWER, status=0, tokens=0, first=0.0, last=0.0, end=0.0)],
            "samples": [],
        },
        {"samples": [sample(98.0)]},
        {"phases": []},
    ],
)
def test_what_is_missing_is_left_out(missing: dict[str, object]) -> None:
    for chart in plots(run(**missing)):
        drawn = ElementTree.fromstring(chart)
        assert not re.search(r"\b(nan|inf)\b", chart)
        assert list(drawn.iter(f"{SVG}path"))
