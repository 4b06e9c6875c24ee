"""Charts are whole SVG documents that show what they were given."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from experiments import curve
from experiments.plot import Curve, line_chart, ticks
from training.progress import Point

SVG = "{http://www.w3.org/2000/svg}"


def test_a_chart_draws_every_curve_at_its_place() -> None:
    chart = line_chart(
        "retention & <forgetting>",
        "updates since",
        "right",
        [
            Curve("memory", [(0, 1.0), (10, 0.5)], errors=[0.0, 0.1]),
            Curve("closed form", [(0, 1.0)], dashed=True),
        ],
        y_range=(0, 1),
        y_percent=True,
    )
    root = ElementTree.fromstring(chart)
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"retention & <forgetting>", "memory", "closed form", "100 %", "10"} <= set(texts)
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(f"{SVG}circle")]
    (x_first, y_first), (x_last, y_last), other = circles
    assert x_first < x_last
    assert y_first < y_last  # SVG's y grows downwards
    assert other == (x_first, y_first)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 50), (0, 1_000_000), (0.93, 1.0), (-3, 4), (0, 0)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    drawn = ticks(low, high)
    assert 1 <= len(drawn) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in drawn)


def test_no_points_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        line_chart("", "", "", [Curve("none", [])])


def test_the_curve_of_a_training_run(tmp_path: Path) -> None:
    for step in (25, 50):
        Point(step, 1.0, "full pool", 0.5, 0.25, 1.0, 1.0).keep(tmp_path / "curve.csv")
    drawn = curve.chart(tmp_path / "curve.csv")
    assert drawn.count("<circle") == 4
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column 'step'"):
        curve.chart(tmp_path / "other.csv")
